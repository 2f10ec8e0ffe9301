//! The group of one program: made before it starts, asked while it runs, removed when it is empty.

use super::super::resources::{Limits, ResourceEvents, Usage};
use super::claim::Claim;
use super::events::Notice;
use super::layout::{Layout, Place, Version};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// How often is looked where the kernel does not tell.
const LOOK: Duration = Duration::from_millis(200);
/// How often an end is looked for where the kernel does not tell, and how soon a kill is repeated.
const AGAIN: Duration = Duration::from_millis(5);

/// The group of one program. Removed when it is dropped, if it is empty then.
#[derive(Debug)]
pub(in super::super) struct Group {
    layout: Layout,
    /// Keeps the group around it.
    _claim: Arc<Claim>,
}

impl Group {
    /// Makes it, with its limits, before anything is in it. Blocks for a moment.
    pub(in super::super) fn make(claim: &Arc<Claim>, name: &str, limits: &Limits) -> io::Result<Self> {
        let mut group = Self { layout: claim.next(name), _claim: Arc::clone(claim) };
        group.layout.make()?;
        // On an error it is dropped, and so removed.
        group.layout.limit(limits)?;
        if let Some(pids) = limits.tool_pids {
            group.layout.make_tools(pids)?;
        }
        Ok(group)
    }

    /// What the jail is to know of it.
    pub(in super::super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// See [`Layout::kill`]; from outside of the jail.
    pub(in super::super) fn kill(&self) {
        self.layout.kill();
    }

    /// See [`Layout::usage`].
    pub(in super::super) fn usage(&self) -> Usage {
        self.layout.usage()
    }

    /// See [`Layout::is_frozen`].
    pub(in super::super) fn is_frozen(&self) -> Option<bool> {
        self.layout.is_frozen()
    }

    /// See [`Layout::events`].
    pub(in super::super) fn events(&self, before: ResourceEvents) -> ResourceEvents {
        self.layout.events(before)
    }

    /// What tells that [`Group::events`] may have changed.
    pub(in super::super) fn alarm(&self) -> Alarm {
        let Layout { memory, pids, tools, .. } = &self.layout;
        let mut alarm = Alarm { notices: Vec::new(), looks: false };
        let mut watch = |place: &Place, directory: &Path, file| match place.version {
            // It says only before a kill that there will be one, so it is looked at.
            Version::V1 => alarm.looks = true,
            Version::V2 => match Notice::open(directory, file) {
                Ok(notice) => alarm.notices.push(notice),
                Err(_) => alarm.looks = true,
            },
        };
        if let Some(place) = memory {
            watch(place, &place.directory, "memory.events");
        }
        for place in pids.iter().chain(tools) {
            watch(place, &place.directory, "pids.events");
        }
        for (place, _) in pids.iter().zip(tools) {
            watch(place, &self.layout.main_in(&place.directory), "pids.events");
        }
        alarm
    }

    /// Freezes or thaws it, and waits until the kernel says that it is done.
    pub(in super::super) async fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.layout.freeze(frozen)?;
        let notice = self.layout.unified.as_deref().and_then(|group| Notice::open(group, "cgroup.events").ok());
        loop {
            match self.layout.is_frozen() {
                Some(now) if now == frozen => return Ok(()),
                Some(_) => wait(notice.as_ref()).await,
                None => return Err(io::ErrorKind::NotFound.into()),
            }
        }
    }

    /// Whether there is something to freeze it with.
    pub(in super::super) fn has_freezer(&self) -> bool {
        self.layout.has_freezer()
    }

    /// Waits until nothing is in it, and kills what still is. This ends nearly at once where a jail has said that it
    /// has no child any more, and is the proof where there is no jail to say so.
    pub(in super::super) async fn emptied(&self) {
        let notice = self.layout.unified.as_deref().and_then(|group| Notice::open(group, "cgroup.events").ok());
        while self.layout.is_populated() {
            self.layout.kill();
            wait(notice.as_ref()).await;
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.layout.remove() {
            tracing::warn!(%error, "a control group could not be removed");
        }
    }
}

/// Waits until the kernel tells of a change, but not for long: what is waited for is looked at again in any case.
async fn wait(notice: Option<&Notice>) {
    match notice {
        Some(notice) => {
            let _ = tokio::time::timeout(LOOK, notice.changed()).await;
        }
        None => sleep(AGAIN).await,
    }
}

/// Tells when a limit may have been felt.
#[derive(Debug)]
pub(in super::super) struct Alarm {
    notices: Vec<Notice>,
    looks: bool,
}

impl Alarm {
    /// Waits for it; for ever where no limit can be felt. Dropping the wait loses nothing.
    pub(in super::super) async fn rings(&self) {
        let changed = async |notice: &Notice| {
            if notice.changed().await.is_err() {
                std::future::pending().await
            }
        };
        let look = async || if self.looks { sleep(LOOK).await } else { std::future::pending().await };
        let mut changes: FuturesUnordered<_> = self.notices.iter().map(changed).collect();
        tokio::select! {
            Some(()) = changes.next() => {}
            () = look() => {}
        }
    }
}
