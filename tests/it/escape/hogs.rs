//! What takes all there is, or does not end.
