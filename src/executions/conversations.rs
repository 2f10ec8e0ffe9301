//! Sessions that callers make: made, prompted, ended, listed.
//!
//! Making one is not queued: it has to have a process before it is answered. What becomes of that process later is in
//! `kept`.

use super::admit::{self, Ceilings, FieldError, non_empty, prose, refuse};
use super::kept::{Changes, Kept};
use super::{Executions, Queued, SUBMIT_TIMEOUT, Shared, SubmitError, View, owner, queue};
use crate::model::request::{ModelConfig, OnRestart, TaskRequest};
use crate::model::task::{ModelChoice, Task};
use crate::model::{ExecutionId, Reason, SessionId, SessionRecord, Status, Submitted, TaskId};
use crate::opencode::profile::Profile;
use crate::sessions::{SessionError, Wanted};
use crate::store::{SessionCursor, SessionView, StoreError};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use std::collections::hash_map::Entry;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often it is looked whose rest is over.
const LOOK: Duration = Duration::from_secs(1);
/// How long the first execution of a new session may take to be on its way, before the answer is given all the same.
const UNDER_WAY: Duration = Duration::from_secs(2);

/// What a caller wants of a new session.
#[derive(Debug)]
pub struct CreateSession {
    pub id: SessionId,
    /// The first prompt; without one the session waits for it.
    pub prompt: Option<String>,
    pub model_config: Option<ModelConfig>,
    pub system_prompt: Option<String>,
    /// Names of fields that came with it and that nobody here knows.
    pub ignored: Vec<String>,
}

/// A session that was made.
#[derive(Clone, Debug)]
pub struct NewSession {
    pub record: SessionRecord,
    /// Of its first execution; `pending` without one.
    pub status: Status,
}

/// Why a session was not made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("there is a session with this id")]
    Exists,
    #[error("as many executions run as may")]
    Full,
    #[error("the sidecar shuts down")]
    ShuttingDown,
    #[error("the session could not be stored in time")]
    NotStored,
    #[error("the database cannot be asked")]
    Store(#[from] StoreError),
    /// For the user: what is missing that sessions are to be protected by.
    #[error("{0}")]
    Refused(String),
    /// For the user: what went wrong with OpenCode.
    #[error("{0}")]
    NotStarted(String),
    #[error("whoever asked for it is gone")]
    Abandoned,
}

/// How a session stands.
#[derive(Clone, Debug)]
pub struct SessionState {
    pub record: SessionRecord,
    /// That of `current`.
    pub status: Status,
    /// The first of its executions that goes on, else the latest one.
    pub current: Option<View>,
    /// How many it has had.
    pub executions: u32,
    pub last_activity: DateTime<Utc>,
}

impl SessionState {
    fn new(record: SessionRecord, current: Option<View>, executions: u32, last_at: Option<DateTime<Utc>>) -> Self {
        let status = match &current {
            Some(view) => view.record.status,
            None => Kept::unused_status(record.ended_at.is_some()),
        };
        let last_activity =
            last_at.or_else(|| current.as_ref().and_then(|view| view.record.completed_at)).unwrap_or(record.created_at);
        Self { record, status, current, executions, last_activity }
    }

    fn of_store(view: SessionView) -> Self {
        let current = view.current.map(|record| View {
            last_seq: record.last_seq,
            record: Arc::new(record),
            current_tool: None,
            queue_position: None,
        });
        Self::new(view.record, current, view.executions, None)
    }
}

impl Kept {
    /// Checks a task that is to run in the session: its model and its directory are the session's.
    pub(super) fn admit(&self, request: TaskRequest, ceilings: &Ceilings) -> Result<(Task, SecretString), FieldError> {
        if request.model_config.is_some() {
            return refuse(
                "model_config",
                "cannot be given with session_id: a session keeps the model it was made with",
            );
        }
        if request.workdir.as_deref().is_some_and(|dir| !dir.is_empty()) {
            return refuse("workdir", "cannot be given with session_id: a session works in the workspace itself");
        }
        if request.on_restart == Some(OnRestart::Resume) {
            return refuse("on_restart", "cannot be `resume` with session_id: a session ends with the sidecar");
        }
        if let Some(limits) = &request.limits {
            for (field, value) in [
                ("limits.memory_bytes", limits.memory_bytes),
                ("limits.pids", limits.pids),
                ("limits.cpu_millis", limits.cpu_millis),
                ("limits.disk_bytes", limits.disk_bytes),
            ] {
                if value.is_some() {
                    return refuse(field, "cannot be given with session_id: a session keeps what it was started with");
                }
            }
        }
        let model = (self.record.model.clone(), self.api_key.clone());
        let (mut task, api_key) = admit::admit(request, ceilings, Some(&model))?;
        task.system_prompt = task.system_prompt.or_else(|| self.record.system_prompt.clone());
        Ok((task, api_key))
    }
}

impl Executions {
    /// A session that callers may send prompts to.
    pub(super) fn kept(&self, id: SessionId) -> Option<Arc<Kept>> {
        self.shared.lock_kept().get(&id).cloned().flatten()
    }

    /// Makes a session: its process runs, its conversation is begun and, where there is a prompt, its first execution is
    /// on its way when this returns. Where `gone` is cancelled (the caller has left) before `answered` is, the session
    /// ends again.
    ///
    /// # Errors
    /// [`CreateError`]
    pub async fn create_session(
        &self,
        request: CreateSession,
        gone: CancellationToken,
        answered: CancellationToken,
    ) -> Result<NewSession, CreateError> {
        let id = request.id;
        let plan = self.plan(request)?;
        if self.is_closing() {
            return Err(CreateError::ShuttingDown);
        }
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let service = self.clone();
        self.shared.tasks.spawn("create session", async move {
            let made = service.make(plan, &gone).await;
            let done = made.is_ok();
            let told = sender.send(made).is_ok();
            if !done {
                return;
            }
            if told {
                tokio::select! {
                    () = answered.cancelled() => return,
                    () = gone.cancelled() => {}
                }
            }
            let why = "whoever asked for the session was gone before it was answered";
            tracing::warn!(session = %id, why, "a session ends again");
            if let Err(error) = service.end_session(id, Some(why), SUBMIT_TIMEOUT).await {
                tracing::error!(session = %id, error = &error as &dyn std::error::Error, "a session could not be ended");
            }
        });
        receiver.await.unwrap_or(Err(CreateError::NotStored))
    }

    fn plan(&self, request: CreateSession) -> Result<Plan, CreateError> {
        let CreateSession { id, prompt, model_config, system_prompt, ignored } = request;
        let ceilings = &self.shared.settings.ceilings;
        let (prompt, system_prompt) = (non_empty(prompt), non_empty(system_prompt));
        prose("prompt", prompt.as_deref(), ceilings)?;
        prose("system_prompt", system_prompt.as_deref(), ceilings)?;
        let model = admit::model(model_config, ceilings, ceilings.default_model.as_ref())?;
        let workdir = self.shared.workspace.root().to_path_buf();
        Ok(Plan { id, prompt, model, system_prompt, ignored, workdir })
    }

    async fn make(&self, plan: Plan, gone: &CancellationToken) -> Result<NewSession, CreateError> {
        let id = plan.id;
        let claim = async {
            let mut decided = self.shared.made.subscribe();
            loop {
                match self.shared.lock_kept().entry(id) {
                    Entry::Vacant(place) => {
                        place.insert(None);
                        return Ok(());
                    }
                    Entry::Occupied(place) if place.get().is_some() => return Err(CreateError::Exists),
                    // Perhaps the first attempt of this caller, who went away and comes again.
                    Entry::Occupied(_) => {}
                }
                // The sender lives as long as `self`.
                let _ = decided.changed().await;
            }
        };
        tokio::select! {
            claimed = claim => claimed?,
            () = gone.cancelled() => return Err(CreateError::Abandoned),
        }
        let made = self.make_in_its_place(plan, gone).await;
        if made.is_err() {
            self.shared.lock_kept().remove(&id);
        }
        self.shared.made.send_replace(());
        made
    }

    async fn make_in_its_place(&self, plan: Plan, gone: &CancellationToken) -> Result<NewSession, CreateError> {
        let id = plan.id;
        self.shared.events.settled().await?;
        if self.shared.store.session(&self.shared.settings.project, id).await?.is_some() {
            return Err(CreateError::Exists);
        }
        self.shared.lock_admission().start_now(Some(id)).map_err(|queue::Full| CreateError::Full)?;
        let made = self.make_with_slot(plan, gone).await;
        // With a prompt the execution gives the slot back.
        if !matches!(made, Ok((_, true))) {
            self.shared.lock_admission().finished(Some(id));
            self.start_next();
        }
        made.map(|(session, _)| session)
    }

    async fn make_with_slot(&self, plan: Plan, gone: &CancellationToken) -> Result<(NewSession, bool), CreateError> {
        let Plan { id, prompt, model: (model, api_key), system_prompt, ignored, workdir } = plan;
        let settings = &self.shared.settings;
        self.shared.make_room().await;
        let wanted = Wanted {
            id,
            profile: Profile { model: model.clone() },
            api_key: api_key.clone(),
            workdir,
            limits: settings.ceilings.limits,
            start_within: Duration::MAX,
            stop: gone.clone(),
        };
        let started = self.shared.sessions.acquire(wanted, None).await;
        let mut session = started.map_err(|error| self.not_made(&error, gone))?;
        let remote_id = match session.conversation(&id.to_string()).await {
            Ok(remote_id) => remote_id,
            Err(error) => {
                session.end(false).await;
                return Err(self.not_made(&SessionError::Silent(error), gone));
            }
        };
        let record = SessionRecord {
            id,
            project_id: settings.project.clone(),
            owner: settings.owner,
            remote_id,
            model,
            system_prompt,
            created_at: Utc::now(),
            ended_at: None,
        };
        let kept = Arc::new(Kept::new(record.clone(), api_key, ignored, session));
        let stored = tokio::time::timeout(SUBMIT_TIMEOUT, self.shared.events.put_session(record.clone())).await;
        let refused = match stored {
            Ok(true) if gone.is_cancelled() => Some(CreateError::Abandoned),
            // Looked at under the lock: who comes after the shutdown has emptied the list must not get into it.
            Ok(true) if !self.enlist(&kept) => Some(CreateError::ShuttingDown),
            Ok(true) => None,
            _ => Some(CreateError::NotStored),
        };
        if let Some(refused) = refused {
            kept.end(Utc::now());
            kept.discard().await;
            // Where it was written, or is after all, it is as one that has ended. Nobody waits for that.
            let (events, record) = (self.shared.events.clone(), kept.to_store());
            self.shared.tasks.spawn("withdraw session", async move {
                events.put_session(record).await;
            });
            return Err(refused);
        }
        let Some(prompt) = prompt else {
            return Ok((NewSession { record, status: Status::Pending }, false));
        };
        let status = self.first_execution(&kept, prompt).await?;
        Ok((NewSession { record, status }, true))
    }

    /// Lists a session that was made; `false` where the sidecar shuts down.
    fn enlist(&self, kept: &Arc<Kept>) -> bool {
        let mut list = self.shared.lock_kept();
        if self.is_closing() {
            return false;
        }
        list.insert(kept.id(), Some(Arc::clone(kept)));
        true
    }

    /// Starts the first execution on the slot that the session was made on, and gives its status once it is on its way.
    async fn first_execution(&self, kept: &Arc<Kept>, prompt: String) -> Result<Status, CreateError> {
        let request = TaskRequest::prompt(TaskId(kept.id().0), kept.id(), prompt);
        let (task, api_key) = kept.admit(request, &self.shared.settings.ceilings)?;
        let record = self.record(task, Some(kept)).map_err(|_| CreateError::ShuttingDown)?;
        // Its session ends with the sidecar: nothing of it is needed after a restart.
        let (owner, seq) = self.begin(record, Some(Arc::clone(kept)), &api_key, None);
        let stored = tokio::time::timeout(SUBMIT_TIMEOUT, owner.writer.committed(seq)).await;
        if stored != Ok(true) {
            let service = self.clone();
            let kept = Arc::clone(kept);
            self.shared.tasks.spawn("withdraw session", async move {
                owner.end_now(Reason::Interrupted, "The session could not be stored in time, and did not run.").await;
                service.forget(&owner);
                service.close(&kept).await;
            });
            return Err(CreateError::NotStored);
        }
        let mut head = owner.writer.head();
        self.run(Queued { owner, api_key });
        let under_way = head.wait_for(|head| head.record.status != Status::Pending);
        let _ = tokio::time::timeout(UNDER_WAY, under_way).await;
        let status = head.borrow().record.status;
        Ok(status)
    }

    fn not_made(&self, error: &SessionError, gone: &CancellationToken) -> CreateError {
        if gone.is_cancelled() {
            return CreateError::Abandoned;
        }
        if let SessionError::NoUser = error {
            tracing::warn!(error = error as &dyn std::error::Error, "a session was not made");
            return CreateError::Full;
        }
        tracing::error!(error = error as &dyn std::error::Error, "a session was not made");
        let failure = owner::not_started(error);
        match failure.reason {
            Reason::SandboxUnavailable => CreateError::Refused(failure.message),
            _ => CreateError::NotStarted(failure.message),
        }
    }

    /// The next prompt of a session: a new execution, which runs when those before it have ended.
    ///
    /// # Errors
    /// [`SubmitError`]
    pub async fn prompt_session(&self, id: SessionId, text: String) -> Result<Submitted, SubmitError> {
        Ok(self.submit(TaskRequest::prompt(TaskId(id.0), id, text), None).await?.submitted)
    }

    /// Ends a session: no further execution, those that wait or run are cancelled, its process and its directories
    /// go. Waits at most `patience` for the executions. Ending it again changes nothing. `None` for an unknown one.
    ///
    /// # Errors
    /// Where only the database knows and cannot be asked.
    pub async fn end_session(
        &self,
        id: SessionId,
        why: Option<&str>,
        patience: Duration,
    ) -> Result<Option<SessionState>, StoreError> {
        if let Some(kept) = self.kept(id) {
            kept.end(Utc::now());
            let begun = Instant::now();
            // Those that wait go first: none of them gets its turn when the one that runs has ended.
            for execution in kept.executions().into_iter().rev() {
                // One that has ended is left as it is.
                if self.shared.lock_live().contains_key(&execution) {
                    self.cancel(execution, why, patience.saturating_sub(begun.elapsed())).await?;
                }
            }
            self.close(&kept).await;
        }
        self.session(id).await
    }

    /// The last part of a session's end: its process and its directories.
    async fn close(&self, kept: &Arc<Kept>) {
        kept.end(Utc::now());
        if !kept.discard().await.nothing_left {
            self.shared.abandoned.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        self.shared.events.put_session(kept.to_store()).await;
        self.shared.lock_kept().remove(&kept.id());
    }

    /// Ends what is left of all sessions; their executions have ended.
    pub(super) async fn end_all_sessions(&self) {
        let all: Vec<_> = self.shared.lock_kept().values().flatten().cloned().collect();
        futures_util::future::join_all(all.iter().map(|kept| self.close(kept))).await;
    }

    /// Parks processes that nobody has used for long, until shutdown.
    pub async fn look_after_sessions(self) {
        let shutdown = self.shared.tasks.shutdown_token().clone();
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let idle = self.shared.settings.session_idle;
            for (_, kept) in self.shared.resting().into_iter().filter(|(since, _)| since.elapsed() >= idle) {
                tracing::info!(session = %kept.id(), "nobody has used the session for long: its process ends");
                kept.park().await;
            }
            self.end_surplus().await;
        }
    }

    async fn end_surplus(&self) {
        let limit = self.shared.settings.max_open;
        let mut unused: Vec<_> = {
            let list = self.shared.lock_kept();
            if list.len() <= limit {
                return;
            }
            list.values().flatten().filter(|kept| kept.is_unused()).cloned().collect()
        };
        unused.sort_by_key(|kept| kept.used_at());
        let surplus = self.shared.lock_kept().len().saturating_sub(limit);
        for kept in unused.into_iter().take(surplus) {
            tracing::warn!(session = %kept.id(), limit, "too many sessions are open: the one unused for longest ends");
            self.close(&kept).await;
        }
    }

    /// How a session stands; `None` where this project has none with the id.
    ///
    /// # Errors
    /// Where only the database knows and cannot be asked.
    pub async fn session(&self, id: SessionId) -> Result<Option<SessionState>, StoreError> {
        let Some(kept) = self.kept(id) else {
            self.shared.events.settled().await?;
            let view = self.shared.store.session(&self.shared.settings.project, id).await?;
            return Ok(view.map(SessionState::of_store));
        };
        let (current, last_at) = match kept.current() {
            None => (None, None),
            Some(Err(record)) => {
                let view = View { last_seq: record.last_seq, record, current_tool: None, queue_position: None };
                (Some(view), None)
            }
            Some(Ok(execution)) => {
                let last_at = self.shared.events.head(execution).map(|head| head.borrow().last_at);
                (self.view(execution).await?, last_at)
            }
        };
        let executions = kept.changes().borrow().executions;
        Ok(Some(SessionState::new(kept.to_store(), current, executions, last_at)))
    }

    /// Sessions of the project, newest first.
    ///
    /// # Errors
    /// Where the database cannot be asked.
    pub async fn sessions(&self, before: Option<SessionCursor>, limit: u32) -> Result<Vec<SessionState>, StoreError> {
        self.shared.events.settled().await?;
        let views = self.shared.store.sessions(&self.shared.settings.project, before, limit).await?;
        let mut states = Vec::with_capacity(views.len());
        for view in views {
            // Those that live know more than the database.
            let live = if self.kept(view.record.id).is_some() { self.session(view.record.id).await? } else { None };
            states.push(live.unwrap_or_else(|| SessionState::of_store(view)));
        }
        Ok(states)
    }

    /// The execution at this place of a session.
    ///
    /// # Errors
    /// Where only the database knows and cannot be asked.
    pub async fn execution_in_session(
        &self,
        id: SessionId,
        ordinal: NonZeroU32,
    ) -> Result<Option<ExecutionId>, StoreError> {
        if let Some(kept) = self.kept(id) {
            let at = usize::try_from(ordinal.get() - 1).unwrap_or(usize::MAX);
            return Ok(kept.executions().get(at).copied());
        }
        self.shared.events.settled().await?;
        let project = &self.shared.settings.project;
        Ok(self.shared.store.execution_in_session(project, id, ordinal).await?.map(|record| record.id))
    }

    /// What is told to those who follow a session; `None` for one that has ended or is unknown.
    pub fn session_changes(&self, id: SessionId) -> Option<watch::Receiver<Changes>> {
        self.kept(id).map(|kept| kept.changes())
    }
}

/// A session as it will be.
struct Plan {
    id: SessionId,
    prompt: Option<String>,
    model: (ModelChoice, SecretString),
    system_prompt: Option<String>,
    ignored: Vec<String>,
    workdir: std::path::PathBuf,
}

impl Shared {
    /// Sessions whose process rests, the one that has rested longest first.
    fn resting(&self) -> Vec<(Instant, Arc<Kept>)> {
        let list = self.lock_kept();
        let mut resting: Vec<_> =
            list.values().flatten().filter_map(|kept| Some((kept.resting_since()?, Arc::clone(kept)))).collect();
        drop(list);
        resting.sort_by_key(|(since, _)| *since);
        resting
    }

    /// Parks as many processes that rest as are needed for those that run: a pod's memory is meant for
    /// `MAX_CONCURRENT_TASKS` of them.
    pub(super) async fn make_room(&self) {
        let running = self.lock_admission().running();
        let resting = self.resting();
        let surplus = (running + resting.len()).saturating_sub(self.settings.max_running);
        for (_, kept) in resting.into_iter().take(surplus) {
            tracing::info!(session = %kept.id(), "its process ends to make room for another");
            kept.park().await;
        }
    }
}
