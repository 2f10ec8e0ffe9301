//! Terminals in the sessions that callers make.
//!
//! A terminal stands beside the session's OpenCode and lives as long as that at most. So one in a session whose process is
//! parked starts that first, on a slot of its own, as an execution would.

use super::kept::Kept;
use super::{Executions, owner, queue};
use crate::model::{Reason, SessionId};
use crate::opencode::profile::Profile;
use crate::sessions::{SessionError, Terminal, TerminalError, TerminalSize, Terminals, Wanted};
use crate::store::StoreError;
use std::sync::Arc;
use std::time::Duration;

/// Why there is no terminal. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum OpenTerminalError {
    #[error("there is no session with this id")]
    UnknownSession,
    #[error("the session has ended")]
    SessionEnded,
    #[error("as many terminals of the session are open as may")]
    TooMany,
    #[error("the session is parked, and as many executions run as may")]
    Full,
    /// It starts or ends; there is one again soon, or none for good.
    #[error("the session's process is just changing")]
    Busy,
    #[error("the sidecar shuts down")]
    ShuttingDown,
    #[error("the database cannot be asked")]
    Store(#[from] StoreError),
    /// For the user: what is missing that sessions are to be protected by.
    #[error("{0}")]
    Refused(String),
    /// For the user: what went wrong.
    #[error("{0}")]
    NotStarted(String),
}

impl Executions {
    /// Starts a shell in a session.
    ///
    /// # Errors
    /// [`OpenTerminalError`]
    pub async fn open_terminal(&self, id: SessionId, size: TerminalSize) -> Result<Terminal, OpenTerminalError> {
        let Some(kept) = self.kept(id) else {
            let ended = self.session(id).await?.is_some();
            return Err(if ended { OpenTerminalError::SessionEnded } else { OpenTerminalError::UnknownSession });
        };
        if self.is_closing() {
            return Err(OpenTerminalError::ShuttingDown);
        }
        let terminals = match kept.terminals().await {
            Some(terminals) => terminals,
            None if kept.ended_at().is_some() => return Err(OpenTerminalError::SessionEnded),
            None => self.awaken(&kept).await?,
        };
        terminals.open(size).await.map_err(|error| match error {
            TerminalError::TooMany => OpenTerminalError::TooMany,
            TerminalError::Ending if kept.ended_at().is_some() => OpenTerminalError::SessionEnded,
            TerminalError::Ending => OpenTerminalError::Busy,
            TerminalError::Start(error) => {
                tracing::error!(session = %id, error = &error as &dyn std::error::Error, "a terminal did not start");
                OpenTerminalError::NotStarted("The shell could not be started.".to_owned())
            }
        })
    }

    /// Starts the process of a session that was parked.
    async fn awaken(&self, kept: &Arc<Kept>) -> Result<Terminals, OpenTerminalError> {
        self.shared.lock_admission().start_now(None).map_err(|queue::Full| OpenTerminalError::Full)?;
        let (service, session) = (self.clone(), Arc::clone(kept));
        // On its own: whoever asked may leave, and the process must not be lost on its way.
        let awakened = self.shared.tasks.spawn("awaken session", async move {
            let shared = &service.shared;
            shared.make_room().await;
            let wanted = Wanted {
                id: session.id(),
                profile: Profile { model: session.record.model.clone() },
                api_key: session.api_key.clone(),
                workdir: shared.workspace.root().to_path_buf(),
                limits: shared.settings.ceilings.limits,
                start_within: Duration::MAX,
                stop: shared.tasks.shutdown_token().child_token(),
            };
            let awakened = session.awaken(shared, wanted).await;
            shared.lock_admission().finished(None);
            service.start_next();
            awakened
        });
        match awakened.await {
            Ok(Ok(terminals)) => Ok(terminals),
            Ok(Err(SessionError::HasEnded)) if kept.ended_at().is_some() => Err(OpenTerminalError::SessionEnded),
            Ok(Err(SessionError::HasEnded)) | Err(_) => Err(OpenTerminalError::Busy),
            Ok(Err(error)) => {
                tracing::error!(session = %kept.id(), error = &error as &dyn std::error::Error, "a session did not start again");
                let failure = owner::not_started(&error);
                Err(match failure.reason {
                    Reason::SandboxUnavailable => OpenTerminalError::Refused(failure.message),
                    _ => OpenTerminalError::NotStarted(failure.message),
                })
            }
        }
    }
}
