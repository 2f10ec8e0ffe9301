//! The journal over lives that end at any place.

use super::*;
use proptest::prelude::*;
use std::io::Write;

fn open(directory: &Path) -> Journal {
    let (journal, damage) = Journal::open(directory).unwrap();
    assert_eq!(damage, []);
    journal
}

fn all(journal: &Journal) -> Vec<Vec<u8>> {
    let (mut records, mut at) = (Vec::new(), journal.start());
    while let Some((record, after)) = journal.next(at).unwrap() {
        assert!(after > at);
        records.push(record);
        at = after;
    }
    records
}

fn files(directory: &Path) -> Vec<PathBuf> {
    segment::list(directory).unwrap().into_iter().map(|number| segment::path(directory, number)).collect()
}

#[test]
fn what_is_appended_is_there_in_order_in_this_life_and_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for life in 0..3u8 {
        let journal = open(directory.path());
        assert_eq!(all(&journal), expected);
        for number in 0..5u8 {
            let record = vec![life, number];
            let (at, after) = journal.append(&record).unwrap();
            assert_eq!(journal.get(at).unwrap(), record);
            assert!(journal.next(after).unwrap().is_none());
            expected.push(record);
        }
        journal.sync().unwrap();
        assert_eq!(all(&journal), expected);
    }
    let size: u64 = files(directory.path()).iter().map(|file| file.metadata().unwrap().len()).sum();
    let (journal, _) = Journal::open(directory.path()).unwrap();
    assert_eq!(journal.bytes(), size + HEADER);
}

#[test]
fn segments_are_begun_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let journal = open(directory.path());
    let record = vec![7; 3 * 1024 * 1024];
    let places: Vec<_> = (0..7).map(|_| journal.append(&record).unwrap()).collect();
    // Two of them fit into each.
    assert_eq!(files(directory.path()).len(), 4);
    assert!(!journal.release(places[2].1, false, Vec::new).unwrap(), "the segment has another one");
    assert!(journal.release(places[3].1, false, Vec::new).unwrap());
    assert_eq!(files(directory.path()).len(), 2);
    assert_eq!(journal.get(places[1].0).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(journal.get(places[4].0).unwrap(), record);
    assert_eq!(all(&journal).len(), 3);
    assert!(journal.release(places[6].1, false, Vec::new).unwrap());
    assert_eq!((journal.bytes(), files(directory.path()).len()), (HEADER, 1));
    let small = journal.append(b"secret").unwrap();
    assert!(!journal.release(small.1, false, Vec::new).unwrap());
    assert_eq!(all(&journal).len(), 1, "a short one is kept for a while");
    assert!(journal.release(small.1, true, Vec::new).unwrap());
    assert_eq!((all(&journal).len(), journal.bytes()), (0, HEADER));
    let left = files(directory.path());
    assert_eq!(left.iter().map(|file| fs::read(file).unwrap().len() as u64).sum::<u64>(), HEADER);
}

#[test]
fn nobody_else_reads_it() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("a/journal");
    let _journal = open(&inner);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&inner), mode(&files(&inner)[0])), (0o700, 0o600));
}

#[test]
fn what_is_not_a_segment_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["notes", "1.journal", "zzzzzzzzzzzzzzzz.journal"] {
        fs::write(directory.path().join(name), "x").unwrap();
    }
    let journal = open(directory.path());
    assert_eq!(all(&journal).len(), 0);
    // Beside a segment and the room for a summary.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 5);
}

#[test]
fn a_loss_of_power_is_told_from_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let journal = open(directory.path());
    assert!(!journal.has_lost());
    journal.begin().unwrap();
    assert!(!open(directory.path()).has_lost(), "this process died, at most");
    let before = |boot: &str| fs::write(directory.path().join("boot"), boot).unwrap();
    before("of another boot");
    assert!(open(directory.path()).has_lost());
    let journal = open(directory.path());
    assert!(journal.has_lost(), "the start between did not come to deal with it");
    journal.begin().unwrap();
    assert!(!open(directory.path()).has_lost());
    journal.close().unwrap();
    assert!(!open(directory.path()).has_lost());
    before("");
    assert!(open(directory.path()).has_lost(), "it was on its way when the power went");
}

#[test]
fn what_is_damaged_is_cut_off_and_told_until_it_is_dealt_with() {
    let directory = tempfile::tempdir().unwrap();
    for segment in 0..2 {
        let journal = open(directory.path());
        journal.append(format!("one {segment}").as_bytes()).unwrap();
        journal.append(format!("two {segment}").as_bytes()).unwrap();
        journal.begin().unwrap();
    }
    // The last byte of each.
    let files = files(directory.path());
    for file in &files {
        let mut bytes = fs::read(file).unwrap();
        *bytes.last_mut().unwrap() ^= 4;
        fs::write(file, bytes).unwrap();
    }
    let (journal, damage) = Journal::open(directory.path()).unwrap();
    let found: Vec<_> = damage.iter().map(|damage| (&damage.file, damage.bytes, damage.in_the_middle)).collect();
    assert_eq!(found, [(&files[0], 13, true), (&files[1], 13, false)]);
    assert_eq!(all(&journal), [b"one 0", b"one 1"]);
    assert!(journal.has_lost());
    let journal = open(directory.path());
    assert!(journal.has_lost(), "the start between did not come to deal with it");
    journal.begin().unwrap();
    assert!(!open(directory.path()).has_lost());
}

/// A disk that is full, as this process feels it: a limit on the size of files would end it, so the file is one that
/// takes nothing.
#[test]
fn a_write_that_fails_leaves_nothing_and_the_next_one_goes_on_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let journal = open(directory.path());
    journal.append(b"one").unwrap();
    journal.lock().file = Arc::new(File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(journal.append(b"two").unwrap_err().kind(), io::ErrorKind::StorageFull);
    journal.append(b"three").unwrap();
    assert_eq!(all(&journal), [b"one".to_vec(), b"three".to_vec()]);
    assert_eq!(all(&open(directory.path())), [b"one".to_vec(), b"three".to_vec()]);
}

proptest! {
    /// Whatever becomes of the end of the last segment: what was whole before it is there, and nothing else.
    #[test]
    fn a_tail_that_is_torn_or_flipped_costs_only_itself(
        records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
        cut in any::<prop::sample::Index>(),
        flip in prop::option::of((any::<prop::sample::Index>(), 0..8u8)),
        rubbish in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut ends = vec![HEADER];
        {
            let journal = open(directory.path());
            for record in &records {
                ends.push(journal.append(record).unwrap().1.offset);
            }
        }
        let file = &files(directory.path())[0];
        let mut bytes = fs::read(file).unwrap();
        let keep = cut.index(bytes.len() + 1);
        bytes.truncate(keep);
        let mut good = keep;
        if let Some((at, bit)) = flip && !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            good = at;
        }
        bytes.extend(&rubbish);
        File::create(file).unwrap().write_all(&bytes).unwrap();
        // Rubbish that goes on with what was cut may be just what was there.
        let whole = ends.iter().skip(1).filter(|end| **end as usize <= good).count();
        let (journal, _) = Journal::open(directory.path()).unwrap();
        let found = all(&journal);
        prop_assert!(found.len() >= whole && found.len() <= records.len().max(whole), "{found:?}");
        prop_assert_eq!(&found[..], &records[..found.len()]);
        prop_assert!(found.len() == whole || !rubbish.is_empty());
        // It goes on.
        journal.append(b"next").unwrap();
        let found = all(&open(directory.path()));
        prop_assert_eq!(found.last().map(Vec::as_slice), Some(&b"next"[..]));
    }
}
