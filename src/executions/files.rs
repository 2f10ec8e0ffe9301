//! The files of an execution, for whoever may read them: its working directory, while it runs and after.
//!
//! What is safe to read is for [`crate::workspace::files`] to say. Here is what keeps a slow disk from holding up anything
//! else: files are read on threads of their own, so many at once, and nobody waits for one for long.

use super::Executions;
use crate::model::ExecutionRecord;
use crate::tasks::Tasks;
use crate::workspace::Workspace;
use crate::workspace::files::{FileError, FilePath, Listing, OpenFile, Tree};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

/// Requests that read files at once; each may have one file open, and one thread.
pub const MAX_READERS: usize = 32;
/// How long the disk may take for one step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why files were not read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// As many are read as may be at once.
    #[error("as many files are read as may be")]
    Busy,
    /// The disk did not answer in time.
    #[error("the disk took longer than {} s", PATIENCE.as_secs())]
    Timeout,
    /// The files say no.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The right to read the files of one execution; a place among those who read. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Files {
    workspace: Workspace,
    workdir: Option<Arc<str>>,
    tasks: Tasks,
    place: Arc<OwnedSemaphorePermit>,
    patience: Duration,
}

impl Executions {
    /// The files of an execution. Paths are relative to its working directory, as those in its events are.
    ///
    /// # Errors
    /// [`FilesError::Busy`]
    pub fn files(&self, record: &ExecutionRecord) -> Result<Files, FilesError> {
        let shared = &self.shared;
        let place = Arc::clone(&shared.readers).try_acquire_owned().map_err(|_| FilesError::Busy)?;
        Ok(Files {
            workspace: shared.workspace.clone(),
            workdir: record.task.workdir.as_deref().map(Arc::from),
            tasks: shared.tasks.clone(),
            place: Arc::new(place),
            patience: PATIENCE,
        })
    }
}

impl Files {
    /// A page of a directory, in the order of the names' bytes: at most `limit` of what comes after the name `after`. Its
    /// cost is that of reading the whole directory once.
    ///
    /// # Errors
    /// [`FilesError`]
    pub async fn list(&self, path: FilePath, after: Option<Vec<u8>>, limit: usize) -> Result<Listing, FilesError> {
        self.work(move |tree, wanted| tree()?.list(&path, after.as_deref(), limit, wanted)).await
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// [`FilesError`]
    pub async fn open(&self, path: FilePath) -> Result<Arc<OpenFile>, FilesError> {
        self.work(move |tree, _| tree()?.open(&path).map(Arc::new)).await
    }

    /// At most `most` bytes of a file from `offset` on; fewer only where it ends.
    ///
    /// # Errors
    /// [`FilesError`]
    pub async fn read(&self, file: &Arc<OpenFile>, offset: u64, most: usize) -> Result<Vec<u8>, FilesError> {
        let file = Arc::clone(file);
        self.work(move |_, _| file.read_at(offset, most)).await
    }

    /// Does work that may block, with a way to the directory, and one to ask whether it is still waited for. Work that
    /// hangs keeps its place.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Fn() -> Result<Tree, FileError>, &dyn Fn() -> bool) -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, FilesError> {
        let given_up = CancellationToken::new();
        let _whoever_waits = given_up.clone().drop_guard();
        let Self { workspace, workdir, place, .. } = self.clone();
        let done = self.tasks.spawn_blocking(move || {
            let _place = place;
            work(&|| workspace.tree(workdir.as_deref()), &|| !given_up.is_cancelled())
        });
        match tokio::time::timeout(self.patience, done).await {
            Ok(Ok(done)) => Ok(done?),
            Ok(Err(broken)) => Err(FileError::Failed(std::io::Error::other(broken)).into()),
            Err(_) => Err(FilesError::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn a_disk_that_hangs_is_not_waited_for_and_keeps_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let places = Arc::new(Semaphore::new(1));
        let files = Files {
            workspace: Workspace::open(dir.path()).unwrap(),
            workdir: None,
            tasks: Tasks::new(),
            place: Arc::new(Arc::clone(&places).try_acquire_owned().unwrap()),
            patience: Duration::from_millis(20),
        };
        let (goes_on, hangs) = mpsc::channel::<()>();
        let (says, said) = mpsc::channel();
        let work = files.work(move |_, wanted| {
            let _ = hangs.recv();
            let _ = says.send(wanted());
            Ok(())
        });
        let answer = work.await;
        assert!(matches!(answer, Err(FilesError::Timeout)), "{answer:?}");
        drop(files);
        assert!(places.try_acquire().is_err());
        goes_on.send(()).unwrap();
        assert!(!said.recv().unwrap(), "nobody waits for it any more");
        drop(places.acquire().await.unwrap());
    }
}
