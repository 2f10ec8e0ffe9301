//! Executions: taken in, queued, run, cancelled, ended, forgotten.
//!
//! - `admit`: from a request to a task, or to the field that is wrong; `models`: the same for its `model_config`.
//! - `idempotency`: which submissions are known by their key.
//! - `queue`: who runs and who waits, pure.
//! - `conversations`: sessions that callers make: made, prompted, ended, listed.
//! - `kept`: one of them: its executions and what becomes of its process.
//! - `terminals`: shells in such sessions.
//! - `files`: what is in the working directory of one execution.
//! - `lease`: which sidecar of the project an execution is of, and what becomes of those of one that is gone.
//! - `owner`: the life of one execution, from its turn to its last event.
//! - `recovery`: what an earlier life of the sidecar left of them.
//! - `retention`: forgets what is old.
//!
//! Statuses are decided by `model::execution` alone; this module carries out what it says.

mod admit;
mod conversations;
mod files;
mod idempotency;
mod kept;
mod lease;
mod models;
mod owner;
mod queue;
mod recovery;
mod retention;
mod terminals;

pub use crate::sessions::{MAX_TERMINALS, Terminal, TerminalSize};
pub use crate::workspace::files::{Entry, FileError, FilePath, Kind, Listing, OpenFile};
pub use admit::{Ceilings, FieldError};
pub use conversations::{CreateError, CreateSession, NewSession, SessionState};
pub use files::{Files, FilesError, MAX_READERS};
pub use kept::Changes;
pub use recovery::sessions_to_keep;
pub use terminals::OpenTerminalError;

use crate::events::{Events, Head, Writer};
use crate::failpoint;
use crate::model::event::NewEvent;
use crate::model::idempotency::KEY_LIFE;
use crate::model::request::TaskRequest;
use crate::model::{
    ExecutionId, ExecutionRecord, Fingerprint, Idempotency, Reason, SessionId, Status, Submitted, Task,
};
use crate::secrets::OwnKeys;
use crate::sessions::Sessions;
use crate::store::{Cursor, Fact, HistoryFilter, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use crate::workspace::Workspace;
use chrono::{TimeDelta, Utc};
use idempotency::{Claim, KeyError, Keys, Known};
use kept::Kept;
use owner::{Owner, Resumption};
use queue::Admission;
use secrecy::SecretString;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use uuid::Uuid;

/// How long a submission waits for its record to be durable.
const SUBMIT_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the database may take to tell whether it knows a key.
const KEY_LOOK: Duration = Duration::from_secs(1);
/// How long a deletion may take to reach the database before its caller is told to come again.
const DELETE_WAIT: Duration = Duration::from_secs(5);

/// What the service is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    pub project: String,
    /// This sidecar's instance: its state directory's id.
    pub owner: Uuid,
    /// How long another sidecar of the project has to be silent until what it has left is ended.
    pub lease: Duration,
    /// A file whose time says when this sidecar lived last.
    pub alive: PathBuf,
    pub max_running: usize,
    pub max_queued: usize,
    pub ceilings: Ceilings,
    /// Seals the keys of models of executions that may have to survive a restart.
    pub sealing: OwnKeys,
    /// Protections that are on for sessions, by name.
    pub protections: Vec<String>,
    /// How long the process of a caller's session rests before it is parked.
    pub session_idle: Duration,
    /// The most sessions of callers that are open at once; beyond it the one that has rested longest ends.
    pub max_open: usize,
    /// How long what has ended is kept; `None`: for ever.
    pub retention: Option<TimeDelta>,
}

/// The service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Executions {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    store: Store,
    events: Events,
    sessions: Sessions,
    workspace: Workspace,
    tasks: Tasks,
    metrics: Metrics,
    admission: Mutex<Admission<Queued>>,
    live: Mutex<HashMap<ExecutionId, Arc<Owner>>>,
    /// What an earlier life left, until it is known that nobody has taken it over.
    held: Mutex<BTreeMap<ExecutionId, Queued>>,
    /// Sessions that callers made and that have not ended; `None` while one is being made.
    kept: Mutex<HashMap<SessionId, Option<Arc<Kept>>>>,
    /// Changes when one of them is made, or is not.
    made: watch::Sender<()>,
    keys: Arc<Keys>,
    /// Whether the keys are all that there were when this sidecar first asked the database.
    keys_known: AtomicBool,
    live_count: watch::Sender<usize>,
    closing: AtomicBool,
    abandoned: AtomicUsize,
    /// Places for those who read files.
    readers: Arc<Semaphore>,
}

/// An execution that waits for its turn.
#[derive(Debug)]
struct Queued {
    owner: Arc<Owner>,
    api_key: SecretString,
}

/// Why a submission was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("there is no session with this id that takes tasks")]
    UnknownSession,
    #[error("the session has ended")]
    SessionEnded,
    #[error("the queue is full")]
    QueueFull,
    #[error("the sidecar shuts down")]
    ShuttingDown,
    #[error("the journal is full")]
    JournalFull,
    #[error("the journal takes nothing")]
    JournalFailed,
    #[error("the submission could not be stored in time")]
    NotStored,
    #[error("the idempotency key stands for another submission")]
    KeyReused,
    #[error("a submission with the same idempotency key is not decided yet")]
    KeyPending,
    #[error("as many idempotency keys are remembered as may")]
    TooManyKeys,
    #[error("it is not known yet which idempotency keys were used")]
    KeysUnknown,
}

/// A submission that was taken.
#[derive(Clone, Debug)]
pub struct Submission {
    pub submitted: Submitted,
    /// It had been taken before, under the same key.
    pub replayed: bool,
}

/// How an execution stands, for whoever asks.
#[derive(Clone, Debug)]
pub struct View {
    pub record: Arc<ExecutionRecord>,
    pub current_tool: Option<String>,
    pub queue_position: Option<usize>,
    pub last_seq: u64,
}

impl Executions {
    /// The service; nothing runs yet.
    pub fn new(
        settings: Settings,
        store: Store,
        events: Events,
        sessions: Sessions,
        workspace: Workspace,
        tasks: Tasks,
        metrics: Metrics,
    ) -> Self {
        let admission = Mutex::new(Admission::new(settings.max_running, settings.max_queued));
        Self {
            shared: Arc::new(Shared {
                settings,
                store,
                events,
                sessions,
                workspace,
                tasks,
                metrics,
                admission,
                live: Mutex::default(),
                held: Mutex::default(),
                kept: Mutex::default(),
                keys: Arc::new(Keys::new(idempotency::MOST)),
                keys_known: AtomicBool::new(false),
                made: watch::Sender::new(()),
                live_count: watch::Sender::new(0),
                closing: AtomicBool::new(false),
                abandoned: AtomicUsize::new(0),
                readers: Arc::new(Semaphore::new(MAX_READERS)),
            }),
        }
    }

    /// A new execution: its record and its first event are queued as one.
    fn begin(
        &self,
        record: ExecutionRecord,
        kept: Option<Arc<Kept>>,
        api_key: &SecretString,
        sealed: Option<String>,
    ) -> (Arc<Owner>, u64) {
        let pending = NewEvent::status(Status::Pending, None, None);
        let facts = sealed.map(Fact::Credentials).into_iter().collect();
        let (writer, seq) = self.shared.events.begin(record.clone(), facts, pending);
        writer.hide(api_key);
        (self.adopt(record, writer, kept, None), seq)
    }

    fn adopt(
        &self,
        record: ExecutionRecord,
        writer: Writer,
        kept: Option<Arc<Kept>>,
        resumption: Option<Resumption>,
    ) -> Arc<Owner> {
        let owner = Arc::new(Owner::new(record, writer, kept, resumption));
        let mut live = self.shared.lock_live();
        live.insert(owner.id, Arc::clone(&owner));
        self.shared.live_count.send_replace(live.len());
        owner
    }

    fn forget(&self, owner: &Owner) {
        if let Some((reason, ran)) = owner.outcome() {
            self.shared.metrics.execution_ended(reason, ran);
        }
        if let Some(kept) = &owner.kept {
            kept.finished(&owner.writer.head().borrow());
        }
        let mut live = self.shared.lock_live();
        live.remove(&owner.id);
        self.shared.live_count.send_replace(live.len());
    }

    /// Takes a task in: it is durable when this returns, and runs when its turn comes. Goes on to its end even
    /// where the caller does not wait for it.
    ///
    /// With a key that stands for the same submission already, nothing is taken in, whatever else stands in the way: what
    /// was taken then is returned. One that comes while the first is not decided yet waits for that.
    ///
    /// # Errors
    /// [`SubmitError`]; nothing of it runs then, and its key is as free as before.
    pub async fn submit(
        &self,
        request: TaskRequest,
        idempotency: Option<Idempotency>,
    ) -> Result<Submission, SubmitError> {
        let claim = match idempotency {
            None => None,
            Some(idempotency) => match self.claim(idempotency).await? {
                Ok(claim) => Some(claim),
                Err(submitted) => return Ok(Submission { submitted, replayed: true }),
            },
        };
        let kept = request.session_id.map(|id| self.kept(id).ok_or(SubmitError::UnknownSession)).transpose()?;
        let ceilings = &self.shared.settings.ceilings;
        let (task, api_key) = match &kept {
            Some(kept) => kept.admit(request, ceilings)?,
            None => admit::admit(request, ceilings, ceilings.default_model.as_ref())?,
        };
        if let Err(error) = self.shared.workspace.workdir(task.workdir.as_deref()) {
            return Err(FieldError { field: "workdir".to_owned(), reason: error.to_string() }.into());
        }
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(SubmitError::ShuttingDown);
        }
        if self.shared.events.is_full() {
            return Err(SubmitError::JournalFull);
        }
        if self.shared.events.trouble().is_some() {
            return Err(SubmitError::JournalFailed);
        }
        // A place is held before anything is written, so that what is durable also runs.
        self.shared.lock_admission().reserve().map_err(|queue::Full| SubmitError::QueueFull)?;
        let service = self.clone();
        let taken_in =
            self.shared.tasks.spawn("submit", async move { service.take_in(task, api_key, kept, claim).await });
        let submitted = taken_in.await.unwrap_or(Err(SubmitError::NotStored))?;
        Ok(Submission { submitted, replayed: false })
    }

    /// Claims a key, or gives (`Err`) what was taken under it.
    async fn claim(&self, idempotency: Idempotency) -> Result<Result<Claim, Submitted>, SubmitError> {
        let deadline = Instant::now() + SUBMIT_TIMEOUT;
        loop {
            // Before the claim: one that is made while they are being learnt says nothing of what an earlier life took.
            let all_known = self.shared.keys_known.load(Ordering::SeqCst);
            match self.shared.keys.ask(idempotency.clone(), Utc::now()) {
                Ok(Known::No(claim)) => {
                    return match self.taken_elsewhere(&idempotency, all_known).await? {
                        None => Ok(Ok(claim)),
                        Some((fingerprint, submitted)) => {
                            drop(claim);
                            let first = Idempotency { fingerprint, ..idempotency.clone() };
                            self.shared.keys.remember(vec![(first, submitted.clone())]);
                            if fingerprint == idempotency.fingerprint {
                                Ok(Err(submitted))
                            } else {
                                Err(SubmitError::KeyReused)
                            }
                        }
                    };
                }
                Ok(Known::Yes(submitted)) => return Ok(Err(submitted)),
                Ok(Known::Soon(mut decided)) => {
                    // It never changes: it closes.
                    if tokio::time::timeout_at(deadline, decided.changed()).await.is_err() {
                        return Err(SubmitError::KeyPending);
                    }
                }
                Err(KeyError::Mismatch) => return Err(SubmitError::KeyReused),
                Err(KeyError::Full) => return Err(SubmitError::TooManyKeys),
            }
        }
    }

    /// Whether the database knows a key that is not known here: another sidecar of the project may have taken it. Where it
    /// cannot be asked the key is taken for a new one, where those of earlier lives are all known.
    async fn taken_elsewhere(
        &self,
        of: &Idempotency,
        all_known: bool,
    ) -> Result<Option<(Fingerprint, Submitted)>, SubmitError> {
        let since = Utc::now() - KEY_LIFE;
        let known = self.shared.store.submitted_under(&self.shared.settings.project, &of.caller, &of.key, since);
        match tokio::time::timeout(KEY_LOOK, known).await {
            Ok(Ok(taken)) => Ok(taken),
            _ if all_known => Ok(None),
            _ => Err(SubmitError::KeysUnknown),
        }
    }

    /// A new execution, given its place where it is one of a caller's session.
    fn record(&self, task: Task, kept: Option<&Kept>) -> Result<ExecutionRecord, kept::HasEnded> {
        let settings = &self.shared.settings;
        let mut record =
            ExecutionRecord::new(&settings.project, settings.owner, task, settings.protections.clone(), Utc::now());
        if let Some(kept) = kept {
            record.session_id = kept.id();
            record.ordinal = Some(kept.register(record.id)?);
        }
        Ok(record)
    }

    async fn take_in(
        &self,
        task: Task,
        api_key: SecretString,
        kept: Option<Arc<Kept>>,
        claim: Option<Claim>,
    ) -> Result<Submitted, SubmitError> {
        let session = kept.as_ref().map(|kept| kept.id());
        let Ok(mut record) = self.record(task, kept.as_deref()) else {
            self.shared.lock_admission().release();
            return Err(SubmitError::SessionEnded);
        };
        record.idempotency = claim.as_ref().map(|claim| claim.idempotency().clone());
        let submitted = record.submitted();
        // One of a caller's session ends with it, and needs nothing after a restart.
        let sealed = match &kept {
            Some(_) => None,
            None => match self.shared.settings.sealing.seal(&api_key, record.id.0.as_bytes()) {
                Ok(sealed) => Some(sealed),
                Err(error) => {
                    tracing::error!(%error, "the key of a task's model cannot be sealed");
                    self.shared.lock_admission().release();
                    return Err(SubmitError::NotStored);
                }
            },
        };
        failpoint::pass("submit-admitted");
        let (owner, seq) = self.begin(record, kept, &api_key, sealed);
        failpoint::pass("submit-queued");
        let stored = tokio::time::timeout(SUBMIT_TIMEOUT, owner.writer.committed(seq)).await;
        if stored == Ok(true) {
            failpoint::pass("submit-durable");
            let closing = {
                // Looked at under the lock: who comes after the shutdown has emptied the queue must not get into it. What
                // is durable is taken all the same, and runs after the restart.
                let mut admission = self.shared.lock_admission();
                let closing = self.shared.closing.load(Ordering::SeqCst);
                if closing {
                    admission.release();
                } else {
                    admission.enqueue(owner.id, session, Queued { owner: Arc::clone(&owner), api_key });
                }
                closing
            };
            if let Some(claim) = claim {
                claim.taken(submitted.clone());
            }
            failpoint::pass("submit-taken");
            if closing {
                self.leave_waiting(&owner).await;
            } else {
                self.start_next();
            }
            return Ok(submitted);
        }
        self.shared.lock_admission().release();
        // Where it is written after all, once the database is back, it is as one that never ran, and has no key.
        owner.give_key_back();
        let service = self.clone();
        self.shared.tasks.spawn("withdraw", async move {
            owner.end_now(Reason::Interrupted, "The submission was refused, and the task did not run.").await;
            service.forget(&owner);
        });
        Err(SubmitError::NotStored)
    }

    /// The shutdown has come before the turn of one that waits: it waits on, for the next life. One of a caller's session
    /// ends with that.
    async fn leave_waiting(&self, owner: &Owner) {
        if owner.kept.is_some() {
            owner.end_now(Reason::Interrupted, "The sidecar shut down before the task's turn came.").await;
        }
        self.forget(owner);
    }

    /// Starts as many as there are slots.
    fn start_next(&self) {
        let mut admission = self.shared.lock_admission();
        while let Some((_, queued)) = admission.start_next() {
            let waited = Utc::now() - queued.owner.created_at();
            self.shared.metrics.queue_waited(waited.to_std().unwrap_or_default());
            self.run(queued);
        }
        self.shared.show_load(&admission);
    }

    /// Runs an execution that has a slot, and gives the slot back.
    fn run(&self, Queued { owner, api_key }: Queued) {
        let service = self.clone();
        self.shared.tasks.spawn("execution", async move {
            let nothing_left = owner.live(&service.shared, api_key).await;
            if !nothing_left {
                service.shared.abandoned.fetch_add(1, Ordering::SeqCst);
            }
            service.forget(&owner);
            service.shared.lock_admission().finished(owner.kept.as_ref().map(|kept| kept.id()));
            service.start_next();
        });
    }

    /// How an execution stands; `None` where this project has none with the id.
    ///
    /// # Errors
    /// Where only the database knows and cannot be asked.
    pub async fn view(&self, id: ExecutionId) -> Result<Option<View>, StoreError> {
        let owner = self.shared.lock_live().get(&id).cloned();
        let head = self.shared.events.head(id).map(|head| head.borrow().clone());
        if let Some(Head { committed: true, record, last_seq, .. }) = head {
            let current_tool = owner.and_then(|owner| owner.current_tool());
            let queue_position = self.shared.lock_admission().position(id);
            return Ok(Some(View { record, current_tool, queue_position, last_seq }));
        }
        let record = self.shared.events.record(id).await?;
        Ok(record.map(|record| View { last_seq: record.last_seq, record, current_tool: None, queue_position: None }))
    }

    /// History of the project, newest first.
    ///
    /// # Errors
    /// Where the database cannot be asked, or lacks something that it does not take.
    pub async fn history(
        &self,
        filter: &HistoryFilter,
        before: Option<Cursor>,
        limit: u32,
    ) -> Result<Vec<ExecutionRecord>, StoreError> {
        self.shared.events.settled().await?;
        self.shared.store.history(&self.shared.settings.project, filter, before, limit).await
    }

    /// The log that an execution's events are read from.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// Asks for the end of an execution and waits, at most `patience`, until it has ended. Asking again, or after the
    /// end, changes nothing. `None` for an unknown one.
    ///
    /// # Errors
    /// Where only the database knows and cannot be asked.
    pub async fn cancel(
        &self,
        id: ExecutionId,
        why: Option<&str>,
        patience: Duration,
    ) -> Result<Option<View>, StoreError> {
        let owner = self.shared.lock_live().get(&id).cloned();
        if let Some(owner) = owner {
            let message = match why {
                Some(why) => format!("Cancelled by the caller: {why}"),
                None => "Cancelled by the caller.".to_owned(),
            };
            // The lock decides: whoever takes it out of the queue ends it.
            let queued = {
                let mut admission = self.shared.lock_admission();
                let queued = admission.remove(id).or_else(|| self.shared.lock_held().remove(&id));
                self.shared.show_load(&admission);
                queued
            };
            match queued {
                Some(queued) => {
                    let service = self.clone();
                    self.shared.tasks.spawn("cancel", async move {
                        queued.owner.end_now(Reason::Cancelled, &message).await;
                        service.forget(&queued.owner);
                    });
                }
                None => owner.ask_to_end(Reason::Cancelled, &message).await,
            }
            self.ended(id, patience).await;
        }
        self.view(id).await
    }

    /// Waits until an execution has ended, at most `patience`; `true` where it has, or is unknown.
    pub async fn ended(&self, id: ExecutionId, patience: Duration) -> bool {
        let Some(mut head) = self.shared.events.head(id) else { return true };
        tokio::time::timeout(patience, head.wait_for(|head| head.ended)).await.is_ok()
    }

    /// Ends an execution if it still runs, and removes its record and its events for good. `false` where it could
    /// not be ended in time, and is still there. Its key goes with it.
    ///
    /// # Errors
    /// Where the database is away: then it is removed as soon as that is back.
    pub async fn delete(&self, id: ExecutionId, patience: Duration) -> Result<bool, StoreError> {
        let view = self.cancel(id, Some("the execution is deleted"), patience).await?;
        // One that another sidecar runs is that one's to end.
        if view.as_ref().is_some_and(|view| !view.record.status.is_final()) {
            return Ok(false);
        }
        failpoint::pass("delete-begun");
        let deleted = self.shared.events.delete(id, DELETE_WAIT).await;
        failpoint::pass("delete-done");
        if let Some(idempotency) = view.and_then(|view| view.record.idempotency.clone()) {
            self.shared.keys.forget(&idempotency, id);
        }
        if deleted { Ok(true) } else { Err(StoreError::timeout(DELETE_WAIT)) }
    }

    /// Executions that run and that wait.
    pub fn load(&self) -> (usize, usize) {
        let admission = self.shared.lock_admission();
        (admission.running(), admission.queued())
    }

    /// Whether no task is taken any more.
    pub fn is_closing(&self) -> bool {
        self.shared.closing.load(Ordering::SeqCst)
    }

    /// Takes nothing more in, and waits at most `grace` until nothing runs: what waits and what is to be resumed goes on in
    /// the next life, everything else ends as `interrupted`.
    ///
    /// # Errors
    /// How many executions or sessions had to be abandoned.
    pub async fn shut_down(&self, grace: Duration) -> Result<(), usize> {
        self.shared.closing.store(true, Ordering::SeqCst);
        let mut queued = self.shared.lock_admission().drain();
        queued.extend(std::mem::take(&mut *self.shared.lock_held()).into_values());
        let mut waiting = BTreeSet::new();
        for queued in queued {
            waiting.insert(queued.owner.id);
            // Side by side: each waits until it is durable, which takes for ever where the disk takes nothing.
            let service = self.clone();
            self.shared.tasks.spawn("leave waiting", async move { service.leave_waiting(&queued.owner).await });
        }
        let running: Vec<_> = self.shared.lock_live().values().cloned().collect();
        for owner in running.into_iter().filter(|owner| !waiting.contains(&owner.id)) {
            if !owner.ask_to_suspend().await {
                owner.ask_to_end(Reason::Interrupted, "The sidecar shut down while the task was running.").await;
            }
        }
        let mut live = self.shared.live_count.subscribe();
        let begun = Instant::now();
        let _ = tokio::time::timeout(grace, live.wait_for(|live| *live == 0)).await;
        // Their executions have ended: what is left of them ends at once.
        let _ = tokio::time::timeout(grace.saturating_sub(begun.elapsed()), self.end_all_sessions()).await;
        let left = *self.shared.live_count.borrow() + self.shared.abandoned.load(Ordering::SeqCst);
        if left == 0 { Ok(()) } else { Err(left) }
    }
}

impl Shared {
    fn lock_admission(&self) -> std::sync::MutexGuard<'_, Admission<Queued>> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show_load(&self, admission: &Admission<Queued>) {
        self.metrics.set_running(admission.running());
        self.metrics.set_queued(admission.queued());
    }

    fn lock_kept(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, Option<Arc<Kept>>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_held(&self) -> std::sync::MutexGuard<'_, BTreeMap<ExecutionId, Queued>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, Arc<Owner>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
