//! A test that fails says why at once. The test runner says it after the last test, which a log that was cut off, or a
//! run that was, no longer has.

use std::io::Write;
use std::sync::Once;

/// The most of a message that is said at once, in characters. The test runner has the whole.
const MOST: usize = 2000;

/// From here on, for all tests of this process.
pub(crate) fn are_said_at_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let said: String = panic.to_string().chars().take(MOST).collect();
            let thread = std::thread::current();
            // Straight to the descriptor: what is printed by the macros, the test runner keeps for later.
            let _ = writeln!(std::io::stderr(), "\n{}: {said}", thread.name().unwrap_or("a thread"));
            before(panic);
        }));
    });
}
