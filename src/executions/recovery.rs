//! What an earlier life left, and what becomes of it: executions that waited wait again, those that ran and are to be
//! resumed go on in the conversation that they had, and all others end as interrupted. Their processes are gone by then.
//!
//! Nothing of it needs the database: it is in the journal. What the database alone knows is taken care of once it is there.

use super::owner::Resumption;
use super::{Executions, Queued, idempotency};
use crate::events::{Inherited, OpenTool, Standing};
use crate::failpoint;
use crate::model::idempotency::KEY_LIFE;
use crate::model::request::OnRestart;
use crate::model::{ExecutionId, Reason, SessionId, Status};
use crate::sessions::KnownCalls;
use crate::store::{Outcome, OutcomeFailure, StoreError};
use chrono::Utc;
use secrecy::SecretString;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often an execution is resumed: one that takes the sidecar with it each time is not to do so for ever.
const MAX_RESUMPTIONS: u32 = 3;
/// Why an execution has ended that nobody knows more of; for people.
pub(super) const GONE: &str = "The sidecar that ran the task, or its node, went away.";
/// How long the start waits for the database.
const LOOK: Duration = Duration::from_secs(2);
/// How long the database is left alone after it could not be asked.
const PAUSE: Duration = Duration::from_secs(2);

/// What becomes of an execution that was left.
enum Fate {
    /// It waits for its turn again, to begin or to go on, with its key as it is sealed now; for people, why.
    Waits { api_key: SecretString, sealed: String, resumption: Option<Resumption>, message: &'static str },
    /// Its run had ended.
    HasEnded(Outcome),
    /// It ends; for people, why.
    Ends(&'static str),
}

/// Whether it may go on where it was, and so needs what it has on disk.
fn is_resumable(standing: &Standing) -> bool {
    let record = &standing.record;
    record.task.on_restart == OnRestart::Resume
        && record.status != Status::Pending
        && record.ordinal.is_none()
        && record.generation.get() <= MAX_RESUMPTIONS
}

/// The sessions whose directories have to survive the start.
pub fn sessions_to_keep(inherited: &Inherited) -> BTreeSet<SessionId> {
    let resumable = inherited.standing.iter().filter(|standing| is_resumable(standing));
    resumable.filter(|standing| standing.conversation.is_some()).map(|standing| standing.record.session_id).collect()
}

impl Executions {
    /// Takes care of what an earlier life of this instance left in the journal. With `has_lost` the logs may lack events
    /// that somebody saw, and go on under a new epoch. Call it before anything is taken in, and once. Returns whether the keys
    /// of all that waits are on the disk as they are sealed now.
    pub async fn recover(&self, inherited: Inherited, has_lost: bool) -> bool {
        failpoint::pass("recovery-begun");
        self.shared.keys.remember(inherited.keys);
        self.shared.keys_known.store(inherited.keys_known, Ordering::SeqCst);
        let mut all_kept = true;
        for standing in inherited.standing {
            all_kept &= self.take_up(standing, has_lost).await;
            failpoint::pass("recovery-taken-up");
        }
        let is_ours = is_recent(self.shared.settings.alive.as_path(), self.shared.settings.lease);
        if let Err(error) = self.let_wait(is_ours).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what has waited is held until the database says that nobody has taken it over"
            );
        }
        for mut session in inherited.sessions {
            session.ended_at = Some(Utc::now());
            let events = self.shared.events.clone();
            // It is in the journal at once; nobody waits for the database.
            self.shared.tasks.spawn("end of a session", async move {
                events.put_session(session).await;
            });
        }
        let catching_up = self.shared.tasks.spawn("catching up", self.clone().catch_up());
        if !self.shared.store.is_away() {
            // It takes no time that anybody feels. Where it does after all it goes on beside everything else.
            let _ = tokio::time::timeout(LOOK, catching_up).await;
        }
        all_kept
    }

    /// `false` where it waits and its key is not on the disk as it is sealed now.
    async fn take_up(&self, standing: Standing, has_lost: bool) -> bool {
        let id = standing.record.id;
        let Some(writer) = self.shared.events.reopen(id) else { return true };
        let fate = self.fate(&standing);
        let Standing { mut record, open_tools, .. } = standing;
        record.generation = record.generation.saturating_add(1);
        if has_lost {
            record.epoch = record.epoch.saturating_add(1);
        }
        let was = record.status.as_str();
        let calls: Vec<_> = open_tools.iter().map(OpenTool::interrupted).collect();
        match fate {
            Fate::Waits { api_key, sealed, resumption, message } => {
                // Under the key of this life: that of the one before is about to go.
                writer.keep_credentials(sealed);
                tracing::info!(execution = %id, status = was, "an execution goes on after a restart");
                writer.hide(&api_key);
                let owner = self.adopt(record, writer, None, resumption);
                let kept = owner.restarted(calls, message).await;
                self.shared.lock_held().insert(id, Queued { owner, api_key });
                return kept;
            }
            Fate::HasEnded(outcome) => {
                let owner = self.adopt(record, writer, None, None);
                owner.end_as(outcome, calls).await;
                self.forget(&owner);
            }
            Fate::Ends(why) => {
                tracing::warn!(execution = %id, status = was, why, "an execution was interrupted by the end of the sidecar");
                let owner = self.adopt(record, writer, None, None);
                owner.end_as(interrupted(why), calls).await;
                self.forget(&owner);
            }
        }
        true
    }

    /// Lets what was taken up wait for its turn, but for what another sidecar has taken over meanwhile. Where the database
    /// does not tell, and nobody can have done so yet (`is_ours`), that is all of it.
    async fn let_wait(&self, is_ours: bool) -> Result<(), StoreError> {
        let ids: Vec<_> = self.shared.lock_held().keys().copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let taken_over = match self.shared.store.taken_over(self.shared.settings.owner, &ids).await {
            Err(_) if is_ours => BTreeSet::new(),
            taken_over => taken_over?,
        };
        failpoint::pass("recovery-held");
        let mut held: Vec<_> = std::mem::take(&mut *self.shared.lock_held()).into_iter().collect();
        held.sort_by_key(|(_, queued)| queued.owner.created_at());
        for (id, queued) in held {
            if taken_over.contains(&id) {
                tracing::warn!(execution = %id, "another sidecar has taken the execution over");
                self.shared.events.give_up(id);
                self.forget(&queued.owner);
            } else {
                self.shared.lock_admission().put_back(id, queued);
            }
        }
        self.start_next();
        Ok(())
    }

    fn fate(&self, standing: &Standing) -> Fate {
        let record = &standing.record;
        let is_waiting = record.status == Status::Pending;
        if let Some(outcome) = &standing.outcome {
            return Fate::HasEnded(outcome.clone());
        }
        if record.project_id != self.shared.settings.project {
            return Fate::Ends("The sidecar or its node went away, and came back for another project.");
        }
        if record.ordinal.is_some() {
            return Fate::Ends("The sidecar or its node went away, and the task's session with it.");
        }
        if !is_waiting && !is_resumable(standing) {
            return Fate::Ends(match record.task.on_restart {
                OnRestart::Fail => "The sidecar or its node went away while the task was running.",
                OnRestart::Resume => "The sidecar or its node went away while the task was running, once too often.",
            });
        }
        let sealed = standing.credentials.as_deref().unwrap_or_default();
        let keys = &self.shared.settings.sealing;
        let api_key = match keys.unseal(sealed, record.id.0.as_bytes()) {
            Ok(api_key) => api_key,
            Err(why) => {
                tracing::error!(execution = %record.id, %why, "the key of the task's model cannot be opened again");
                return Fate::Ends(
                    "The sidecar or its node went away, and the key of the task's model cannot be opened again.",
                );
            }
        };
        let sealed = match keys.seal(&api_key, record.id.0.as_bytes()) {
            Ok(sealed) => sealed,
            Err(error) => {
                tracing::error!(execution = %record.id, %error, "the key of the task's model cannot be sealed again");
                return Fate::Ends(
                    "The sidecar or its node went away, and the key of the task's model cannot be sealed again.",
                );
            }
        };
        if is_waiting {
            let message = "The sidecar was restarted; the task still waits for its turn.";
            return Fate::Waits { api_key, sealed, resumption: None, message };
        }
        let Some(conversation) = &standing.conversation else {
            let message = "The sidecar was restarted before the agent had got the task; it begins.";
            return Fate::Waits { api_key, sealed, resumption: None, message };
        };
        match self.shared.sessions.left(record.session_id, conversation) {
            Some(parked) => {
                let Standing { open_tools, ended_calls, .. } = standing.clone();
                let resumption = Some(Resumption { parked, known: KnownCalls { open_tools, ended_calls } });
                let message = "The sidecar or its node went away while the task was running; it goes on where it was.";
                Fate::Waits { api_key, sealed, resumption, message }
            }
            None => Fate::Ends("The sidecar or its node went away, and what the task's session had on disk is gone."),
        }
    }

    /// Takes care of what the database alone knows, once it is there: keys, and what this instance has in it that is not
    /// in its journal. Returns at the shutdown, too.
    async fn catch_up(self) {
        let shutdown = self.shared.tasks.shutdown_token().clone();
        let work = async {
            self.shared.store.ready().await;
            while let Err(error) = self.ask_the_database().await {
                if !error.is_transient() {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "what an earlier life left in the database cannot be read"
                    );
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn ask_the_database(&self) -> Result<(), StoreError> {
        let (store, settings) = (&self.shared.store, &self.shared.settings);
        self.let_wait(false).await?;
        let since = Utc::now() - KEY_LIFE;
        self.shared.keys.remember(store.submitted_with_key(&settings.project, since, idempotency::MOST).await?);
        if !self.shared.keys_known.swap(true, Ordering::SeqCst) {
            self.shared.events.keys_are_known();
        }
        // What the database lacks of an earlier life's log comes first: an end, or a deletion, may be on its way.
        self.shared.events.flushed().await;
        // Its own journal was lost, or is of a version that did not write it there.
        let left = store.unfinished(&settings.project, settings.owner).await?;
        for record in left {
            self.end_stranger(record.id).await?;
        }
        for session in store.open_sessions(settings.owner).await? {
            // In this order: one of this life is here until the database has its end.
            if self.shared.lock_kept().contains_key(&session.id) {
                continue;
            }
            let now = store.session(&settings.project, session.id).await?;
            if let Some(mut session) = now.map(|view| view.record).filter(|session| session.ended_at.is_none()) {
                session.ended_at = Some(Utc::now());
                self.shared.events.put_session(session).await;
            }
        }
        Ok(())
    }

    /// Ends an execution of this instance that the database alone knows of: nobody runs it.
    async fn end_stranger(&self, id: ExecutionId) -> Result<(), StoreError> {
        // In this order: one of this life is live until the database has its end.
        if self.shared.events.head(id).is_some() {
            return Ok(());
        }
        let now = self.shared.store.execution(&self.shared.settings.project, id).await?;
        let Some(mut record) = now.filter(|record| !record.status.is_final()) else { return Ok(()) };
        record.generation = record.generation.saturating_add(1);
        // The journal that is lost may have shown more than the database has.
        record.epoch = record.epoch.saturating_add(1);
        tracing::warn!(execution = %id, status = record.status.as_str(), "an execution that nobody runs is ended");
        let writer = self.shared.events.open(record.clone());
        let owner = self.adopt(record, writer, None, None);
        owner.end_as(interrupted(GONE), Vec::new()).await;
        self.forget(&owner);
        Ok(())
    }
}

/// Whether this sidecar was alive less than a term ago, so that nobody can have taken anything over from it.
fn is_recent(alive: &Path, term: Duration) -> bool {
    let then = std::fs::metadata(alive).and_then(|file| file.modified());
    // A clock that was set back says nothing.
    then.is_ok_and(|then| then.elapsed().is_ok_and(|ago| ago < term))
}

/// How an execution ends whose sidecar went away.
fn interrupted(why: &str) -> Outcome {
    let reason = Reason::Interrupted;
    let failure = OutcomeFailure { code: reason.as_str().to_owned(), message: why.to_owned(), retry_after: None };
    Outcome { reason, failure: Some(failure) }
}
