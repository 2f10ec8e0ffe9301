//! Every input of the corpus through its target. New inputs, and those that once broke something, go into
//! `fuzz/corpus/<target>/`; `make fuzz` looks for more.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod targets;

use std::collections::BTreeSet;
use std::path::PathBuf;

fn fuzz() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names(directory: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(fuzz().join(directory)).unwrap();
    entries.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn each_input_of_the_corpus_is_survived() {
    for (name, target) in targets::ALL {
        let inputs: Vec<_> = std::fs::read_dir(fuzz().join("corpus").join(name)).unwrap().flatten().collect();
        assert!(inputs.len() >= 5, "{name} has hardly any input");
        for input in inputs {
            let data = std::fs::read(input.path()).unwrap();
            let survived = std::panic::catch_unwind(|| target(&data));
            assert!(survived.is_ok(), "{name}: {}", input.path().display());
        }
    }
}

#[test]
fn each_target_has_a_fuzzer_and_a_corpus() {
    let all: BTreeSet<_> = targets::ALL.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), all);
    assert_eq!(names("corpus"), all);
}
