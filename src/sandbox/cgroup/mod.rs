//! Control groups: the limits, the end and the account of one program and all that descends from it.
//!
//! - `detect`: which groups this process is in, and where.
//! - `claim`: makes room beneath them, after removing what an earlier life left; says what there is. `foresee` says the
//!   same, as far as it shows, and touches nothing.
//! - `layout`: the directories of one group, and what is done with them at once; `v2` and `v1` know the files.
//! - `group`: the group of one program; `events` waits for what the kernel tells about it.
//!
//! A group is always made beneath the group that this process is in, never beside it or at the top: that is what the
//! machine lets it use. The program is in its group before it executes anything: the jail opens the group's doors and
//! its forked child steps through them. The jail itself stays outside, so that no limit of the program and no
//! `cgroup.kill` reaches it. `clone3` with `CLONE_INTO_CGROUP` would do the same in one step, but on version 2 alone,
//! and would need the rest of the standard library's way to start a program written again.
//!
//! Who may write to these directories may raise its own limits and leave: nothing in a session may be able to.
//!
//! `cgroups-rs` (0.5.1) is not used. It takes a host for one of the two versions, and version 2 for what is mounted at
//! `/sys/fs/cgroup`: of version-1 controllers beside a version-2 tree it sees the former alone. It waits for an OOM in a
//! thread of its own and has no way to wait for an end or for a freeze, and it brings D-Bus (`zbus`) and an old `nix`.
//! What it would spare us is one short write to a file each.

mod claim;
mod detect;
mod events;
mod files;
mod foresee;
mod group;
mod layout;
mod v1;
mod v2;

pub(super) use claim::{Claim, claim};
pub(super) use foresee::foresee;
pub(super) use group::{Alarm, Group};
pub(super) use layout::{Layout, join};
