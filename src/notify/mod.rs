//! Tells the backend how the sessions stand that it made (`BACKEND_API_URL`).
//!
//! Each change of status waits in the outbox of [`store`](crate::store), where it was written with the change itself.
//! It is told at least once, in order within a session, until the backend has taken it or says that it does not know
//! the session; sessions do not wait for each other. How far a log goes is told now and then, and forgotten where it
//! fails.
//!
//! Nothing is decided here, and nothing kept that a restart would lose. One task does all of it: what it does side by
//! side are futures of its own, so that where it is given up nothing of it goes on.

mod backend;

pub use backend::ClientError;

use crate::model::{SessionEventId, SessionId, Status};
use crate::store::{Callback, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::{CallbackOutcome, Metrics};
use backend::{Answer, Backend};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use rand::Rng;
use secrecy::SecretString;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

/// Sessions whose changes are told side by side.
const AT_ONCE: usize = 8;
/// Sessions that one look into the outbox finds.
const FOUND: u32 = 64;
/// Between two attempts to take what was told out of the outbox.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// Whom to tell, and of what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Base of the backend's URLs, without user, query or fragment.
    pub backend: Url,
    /// Goes with each call as a bearer token, as it is then.
    pub secret: Option<watch::Receiver<SecretString>>,
    /// Whose outbox it is.
    pub project: String,
    /// The sidecar instance whose running executions are followed.
    pub owner: Uuid,
    pub pace: Pace,
}

/// How long things take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The longest call.
    pub call: Duration,
    /// About the first pause of a session whose change was not taken; each further one is twice as long.
    pub first_pause: Duration,
    /// The longest pause, also where the backend asks for a longer one.
    pub longest_pause: Duration,
    /// Between two looks at what nobody announces: changes that another life left, and how far running logs go.
    pub look: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(10),
            first_pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(60),
            look: Duration::from_secs(10),
        }
    }
}

/// The running task. It ends with the sidecar's other tasks; [`Notifier::drain`] gives it time for that.
#[derive(Debug)]
pub struct Notifier {
    leave: CancellationToken,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Notifier {
    /// Starts to tell what waits, and then what is committed through this store, which has to be one that keeps
    /// callbacks ([`Store::with_callbacks`]).
    ///
    /// # Errors
    /// [`ClientError`]
    pub fn start(settings: Settings, store: Store, metrics: Metrics, tasks: &Tasks) -> Result<Self, ClientError> {
        let backend = Arc::new(Backend::new(&settings)?);
        let (leave, stop) = (CancellationToken::new(), tasks.shutdown_token().child_token());
        let teller = Teller {
            settings,
            store,
            metrics,
            backend,
            work: FuturesUnordered::new(),
            found: VecDeque::new(),
            telling: HashSet::new(),
            trouble: HashMap::new(),
            stale: true,
            looking: false,
            blind: false,
            places: Places { running: true, ..Places::default() },
            leaving: false,
        };
        let task = tasks.spawn("notifier", teller.run(leave.clone(), stop.clone()));
        Ok(Self { leave, stop, task })
    }

    /// Tells what waits now, each session's trouble or not, and ends; at most `within`. What is not taken then is left
    /// to the next start.
    pub async fn drain(mut self, within: Duration) {
        self.leave.cancel();
        if tokio::time::timeout(within, &mut self.task).await.is_err() {
            self.stop.cancel();
            // It looks at nothing else any more.
            let _ = self.task.await;
        }
    }
}

/// A session whose first change was not taken.
#[derive(Debug)]
struct Trouble {
    tries: u32,
    /// Not to be tried before.
    until: Option<Instant>,
}

/// How far logs go, as far as the backend was told.
#[derive(Debug, Default)]
struct Places {
    told: HashMap<SessionId, SessionEventId>,
    /// Sessions that the backend knows to have ended since the last round: told once more.
    ended: Vec<SessionId>,
    /// Whether an execution may be running.
    running: bool,
    /// Whether it is time to look at those.
    due: bool,
    /// A round is under way.
    telling: bool,
}

/// What came to its end.
enum Done {
    /// A look into the outbox: what may be told, and how many changes wait.
    Looked(Result<(Vec<Callback>, u64), StoreError>),
    Told(Callback, Answer),
    /// A round of [`Places`]: what the backend knows now of each session that was looked at.
    Placed {
        all: bool,
        told: Result<Vec<(SessionId, Option<SessionEventId>)>, StoreError>,
    },
}

/// Everything that the task has.
struct Teller {
    settings: Settings,
    store: Store,
    metrics: Metrics,
    backend: Arc<Backend>,
    /// What is under way.
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Found in the outbox, one of each session; to be told next.
    found: VecDeque<Callback>,
    /// Sessions of which a change is being told.
    telling: HashSet<SessionId>,
    trouble: HashMap<SessionId, Trouble>,
    /// Whether the outbox may hold more than what was found.
    stale: bool,
    looking: bool,
    /// Whether the last look failed.
    blind: bool,
    places: Places,
    /// Whether to end as soon as nothing is left to do at once.
    leaving: bool,
}

impl Teller {
    async fn run(mut self, leave: CancellationToken, stop: CancellationToken) {
        let mut written = self.store.callbacks_written();
        let mut tick = tokio::time::interval(self.settings.pace.look);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wake = self.begin(Instant::now());
            if self.leaving && self.work.is_empty() {
                break;
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = leave.cancelled(), if !self.leaving => self.leave(),
                Some(done) = self.work.next(), if !self.work.is_empty() => self.done(done),
                // The store that this holds has the sender.
                Ok(()) = written.changed() => {
                    self.stale = true;
                    self.places.running = true;
                }
                _ = tick.tick() => {
                    self.stale = true;
                    self.places.due = !self.places.telling;
                }
                () = sleep_until(wake) => {}
            }
        }
        let found = self.found.iter().map(|callback| &callback.session_id);
        let left: HashSet<_> = self.trouble.keys().chain(&self.telling).chain(found).collect();
        if !left.is_empty() {
            tracing::warn!(
                sessions = left.len(),
                "the backend was not told everything; the next start goes on with it"
            );
        }
    }

    /// Starts all that can be done now. Gives the time when more can be.
    fn begin(&mut self, now: Instant) -> Option<Instant> {
        for trouble in self.trouble.values_mut() {
            if !self.leaving && trouble.until.is_some_and(|until| until <= now) {
                trouble.until = None;
                self.stale = true;
            }
        }
        if self.stale && !self.looking && self.found.is_empty() {
            (self.stale, self.looking) = (false, true);
            self.work.push(Box::pin(self.look()));
        }
        while self.telling.len() < AT_ONCE
            && let Some(callback) = self.found.pop_front()
        {
            self.telling.insert(callback.session_id);
            self.work.push(Box::pin(self.tell(callback)));
        }
        if !self.places.telling && (self.places.due || !self.places.ended.is_empty()) {
            self.begin_places();
        }
        // Who leaves does not wait for the end of a pause.
        self.trouble.values().filter_map(|trouble| trouble.until).min().filter(|_| !self.leaving)
    }

    fn begin_places(&mut self) {
        let all = std::mem::take(&mut self.places.due) && self.places.running;
        let ended = std::mem::take(&mut self.places.ended);
        if !all && ended.is_empty() {
            return;
        }
        if all {
            // Until it is found, or a change says otherwise.
            self.places.running = false;
        }
        self.places.telling = true;
        let (store, backend, project) = (self.store.clone(), Arc::clone(&self.backend), self.settings.project.clone());
        let (owner, told) = (all.then_some(self.settings.owner), self.places.told.clone());
        self.work.push(Box::pin(async move {
            let told = match store.places(&project, owner, &ended).await {
                Ok(places) => Ok(tell_places(&backend, &told, places).await),
                Err(error) => Err(error),
            };
            Done::Placed { all, told }
        }));
    }

    fn look(&self) -> impl Future<Output = Done> + use<> {
        let (store, project) = (self.store.clone(), self.settings.project.clone());
        let paused = self.trouble.iter().filter(|(_, trouble)| trouble.until.is_some()).map(|(session, _)| *session);
        let except: Vec<SessionId> = self.telling.iter().copied().chain(paused).collect();
        async move {
            let look = async {
                let found = store.callbacks(&project, &except, FOUND).await?;
                let waiting = match (&*found, &*except) {
                    ([], []) => 0,
                    _ => store.callbacks_waiting(&project).await?,
                };
                Ok((found, waiting))
            };
            Done::Looked(look.await)
        }
    }

    /// Tells one change, and takes out of the outbox what the answer settles.
    fn tell(&self, callback: Callback) -> impl Future<Output = Done> + use<> {
        let (store, backend, project) = (self.store.clone(), Arc::clone(&self.backend), self.settings.project.clone());
        async move {
            let answer = backend.status(&callback).await;
            // Where the database is away this goes on until it is back: what was taken is not told again for that.
            loop {
                let settled = match answer {
                    Answer::Taken => store.callback_taken(callback.id).await,
                    Answer::Unknown => store.callbacks_unwanted(&project, callback.session_id).await,
                    Answer::Failed { .. } => Ok(()),
                };
                let Err(error) = settled else { break };
                tracing::warn!(
                    session = %callback.session_id,
                    error = &error as &dyn std::error::Error,
                    "the database does not let go of what the backend was told; trying again"
                );
                tokio::time::sleep(SETTLE_PAUSE).await;
            }
            Done::Told(callback, answer)
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Looked(looked) => {
                self.looking = false;
                self.looked(looked);
            }
            Done::Told(callback, answer) => {
                self.telling.remove(&callback.session_id);
                self.stale = true;
                self.told(&callback, answer);
            }
            Done::Placed { all, told } => {
                self.places.telling = false;
                self.placed(all, told);
            }
        }
    }

    fn looked(&mut self, looked: Result<(Vec<Callback>, u64), StoreError>) {
        match looked {
            Ok((found, waiting)) => {
                if std::mem::take(&mut self.blind) {
                    tracing::warn!("what the backend has to be told can be read again");
                }
                self.metrics.set_callbacks_waiting(waiting);
                self.found.extend(found);
            }
            // The next change or the next tick looks again.
            Err(error) if !self.blind => {
                self.blind = true;
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the database does not say what the backend has to be told; trying again until it does"
                );
            }
            Err(_) => {}
        }
    }

    fn told(&mut self, callback: &Callback, answer: Answer) {
        let session = callback.session_id;
        match answer {
            Answer::Taken => {
                self.metrics.callback(CallbackOutcome::Delivered);
                if let Some(trouble) = self.trouble.remove(&session) {
                    tracing::warn!(%session, tries = trouble.tries + 1, "the backend takes the session's status again");
                }
                if Status::parse(&callback.status).is_some_and(Status::is_final) {
                    self.places.ended.push(session);
                }
            }
            Answer::Unknown => {
                self.metrics.callback(CallbackOutcome::Unwanted);
                self.trouble.remove(&session);
                tracing::warn!(%session, status = callback.status, "the backend does not know the session; it is told no more of what waits");
            }
            Answer::Failed { why, after } => {
                self.metrics.callback(CallbackOutcome::Failed);
                let trouble = self.trouble.entry(session).or_insert_with(|| {
                    tracing::warn!(
                        %session,
                        status = callback.status,
                        why,
                        "the backend does not take the session's status; trying again until it does"
                    );
                    Trouble { tries: 0, until: None }
                });
                tracing::debug!(%session, tries = trouble.tries, why, "a call to the backend failed");
                trouble.until = Some(Instant::now() + self.settings.pace.pause(trouble.tries, after));
                trouble.tries = trouble.tries.saturating_add(1);
            }
        }
    }

    fn placed(&mut self, all: bool, told: Result<Vec<(SessionId, Option<SessionEventId>)>, StoreError>) {
        let told = match told {
            Ok(told) => told,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "how far logs go is not known");
                self.places.running |= all;
                return;
            }
        };
        if all {
            // Those that are not among them have ended, and are forgotten.
            self.places.running |= !told.is_empty();
            self.places.told = told.into_iter().filter_map(|(session, place)| Some((session, place?))).collect();
        }
    }

    /// From here on each session has one more try.
    fn leave(&mut self) {
        self.leaving = true;
        self.stale = true;
        self.trouble.values_mut().for_each(|trouble| trouble.until = None);
    }
}

impl Pace {
    /// How long to wait after so many failed tries before this one, where the backend asks to be left alone for `after`.
    fn pause(&self, before: u32, after: Option<Duration>) -> Duration {
        let longest = self.longest_pause;
        let full =
            2_u32.checked_pow(before).map_or(longest, |times| self.first_pause.saturating_mul(times)).min(longest);
        // Sessions that failed together do not come back together.
        let pause = full.mul_f64(rand::rng().random_range(0.5..=1.0));
        pause.max(after.unwrap_or_default().min(longest))
    }
}

/// Tells the places that are further than the backend was told. Gives what it knows now; a failure changes nothing.
async fn tell_places(
    backend: &Backend,
    told: &HashMap<SessionId, SessionEventId>,
    places: Vec<(SessionId, SessionEventId)>,
) -> Vec<(SessionId, Option<SessionEventId>)> {
    let calls = places.into_iter().map(|(session, place)| async move {
        let known = told.get(&session).copied();
        if known.is_some_and(|known| known >= place) {
            return (session, known);
        }
        let now = match backend.place(session, place).await {
            Answer::Taken => Some(place),
            // It is not asked again in this execution.
            Answer::Unknown => Some(SessionEventId { seq: u64::MAX, ..place }),
            Answer::Failed { why, .. } => {
                tracing::debug!(%session, why, "the backend was not told how far the log goes");
                known
            }
        };
        (session, now)
    });
    stream::iter(calls).buffer_unordered(AT_ONCE).collect().await
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_heed_the_backend() {
        let pace = Pace::default();
        let seconds = Duration::from_secs;
        for (before, full) in [(0, 1), (1, 2), (5, 32), (6, 60), (40, 60), (u32::MAX, 60)] {
            for _ in 0..100 {
                let pause = pace.pause(before, None);
                assert!((seconds(full) / 2..=seconds(full)).contains(&pause), "{before}: {pause:?}");
            }
        }
        assert_eq!(pace.pause(0, Some(seconds(7))), seconds(7));
        assert_eq!(pace.pause(0, Some(seconds(3600))), seconds(60));
        assert!(pace.pause(6, Some(seconds(0))) >= seconds(30));
    }
}
