//! What a credential may do: the scopes, and which of them each operation needs.
//!
//! An operation says its scope in its OpenAPI description (`security(("bearer" = ["tasks:read"]))`), and the table that
//! requests are checked by is made of that. So document and check cannot differ, and one that says none is none.

use http::Method;
use std::collections::HashMap;
use std::sync::Arc;

/// A thing that a credential may be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Status, records, logs, streams and lists, of tasks and sessions.
    TasksRead,
    /// New work: submissions, sessions, prompts.
    TasksExecute,
    /// What runs: cancel, stop, delete, terminals.
    TasksControl,
    /// Output and files for download.
    FilesRead,
    /// What is about the sidecar and not about a task. It does not include the others.
    Admin,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [Self::TasksRead, Self::TasksExecute, Self::TasksControl, Self::FilesRead, Self::Admin];

    /// The word in a token's `scope`, and in the document.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TasksRead => "tasks:read",
            Self::TasksExecute => "tasks:execute",
            Self::TasksControl => "tasks:control",
            Self::FilesRead => "files:read",
            Self::Admin => "admin",
        }
    }

    /// The scope of a word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word)
    }

    fn bit(self) -> u8 {
        1 << (self as u8)
    }
}

/// A set of scopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scopes(u8);

impl Scopes {
    /// All of them.
    pub fn all() -> Self {
        Self(Scope::ALL.iter().fold(0, |set, scope| set | scope.bit()))
    }

    /// The scopes of a `scope` claim: words with spaces between them. Others than ours may stand beside them.
    pub fn parse(words: &str) -> Self {
        Self(words.split_ascii_whitespace().filter_map(Scope::parse).fold(0, |set, scope| set | scope.bit()))
    }

    /// Whether it has this one.
    pub fn has(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }
}

/// An operation that does not say which scope it needs, or names one that there is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the operation {0} does not say which scope it needs")]
pub struct Unscoped(pub String);

/// The scope of each operation, by the pattern of its path. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table(Arc<HashMap<String, Vec<(Method, Scope)>>>);

/// What the table says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Scope(Scope),
    /// The path is known and the method is not: any credential may learn that.
    NoSuchMethod,
    /// A route that nobody has described. Nobody may have it.
    Unknown,
}

impl Table {
    pub(crate) fn of(entries: impl IntoIterator<Item = (String, Method, Scope)>) -> Self {
        let mut table: HashMap<_, Vec<_>> = HashMap::new();
        for (path, method, scope) in entries {
            table.entry(path).or_default().push((method, scope));
        }
        Self(Arc::new(table))
    }

    pub(crate) fn entry(&self, path: &str, method: &Method) -> Entry {
        let Some(methods) = self.0.get(path) else { return Entry::Unknown };
        // The router answers HEAD by what GET does.
        let method = if *method == Method::HEAD { &Method::GET } else { method };
        let found = methods.iter().find(|(known, _)| known == method);
        found.map_or(Entry::NoSuchMethod, |(_, scope)| Entry::Scope(*scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_scopes() {
        let scopes = Scopes::parse("  tasks:read openid files:read tasks:readx ");
        let has: Vec<_> = Scope::ALL.into_iter().filter(|scope| scopes.has(*scope)).collect();
        assert_eq!(has, [Scope::TasksRead, Scope::FilesRead]);
        assert_eq!(Scopes::parse("admin Tasks:Read tasks:control,tasks:read"), Scopes::parse("admin"));
        assert!(!Scopes::parse("admin").has(Scope::TasksRead), "admin is no more than it says");
        assert!(Scope::ALL.into_iter().all(|scope| Scopes::all().has(scope) && !Scopes::default().has(scope)));
    }

    #[test]
    fn what_is_not_described_is_unknown() {
        let table = Table::of([("/a".to_owned(), Method::GET, Scope::TasksRead)]);
        assert_eq!(table.entry("/a", &Method::GET), Entry::Scope(Scope::TasksRead));
        assert_eq!(table.entry("/a", &Method::HEAD), Entry::Scope(Scope::TasksRead));
        assert_eq!(table.entry("/a", &Method::POST), Entry::NoSuchMethod);
        assert_eq!(table.entry("/b", &Method::GET), Entry::Unknown);
    }
}
