#![no_main]

#[path = "../../tests/it/fuzz/targets.rs"]
#[allow(dead_code, reason = "each fuzzer runs one of them")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::requests(data));
