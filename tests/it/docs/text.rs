//! Reads the pages: what stands in code, which links there are, and what is marked as not there yet.

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use std::path::PathBuf;

/// How a paragraph begins that says what this version does not do.
const MARK: &str = "Not in this version:";
/// The same for a whole section, as its first paragraph.
const SECTION_MARK: &str = "Not in this version: this section";

/// Where a piece of code stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a text that speaks of what is there.
    Plain,
    /// In a paragraph that is marked.
    Marked,
    /// In a section that is marked.
    MarkedSection,
}

/// Code within a line, or a block of it.
#[derive(Debug)]
pub(super) struct Code {
    pub(super) text: String,
    /// Of a block: what stands after the fence.
    pub(super) language: Option<String>,
    pub(super) place: Place,
}

#[derive(Debug)]
pub(super) struct Page {
    pub(super) name: String,
    pub(super) code: Vec<Code>,
    pub(super) links: Vec<String>,
}

impl Page {
    /// Whether a word stands in it as code.
    pub(super) fn names(&self, word: &str) -> bool {
        self.code.iter().any(|code| code.language.is_none() && code.text == word)
    }

    /// The blocks in a language.
    pub(super) fn blocks<'a>(&'a self, language: &'a str) -> impl Iterator<Item = &'a Code> {
        self.code.iter().filter(move |code| code.language.as_deref() == Some(language))
    }
}

/// All pages.
pub(super) fn pages() -> Vec<Page> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs");
    let mut pages: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            assert_eq!(path.extension().unwrap(), "md", "{path:?}");
            read(path.file_stem().unwrap().to_str().unwrap(), &std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    pages.sort_by(|a, b| a.name.cmp(&b.name));
    pages
}

fn read(name: &str, text: &str) -> Page {
    let mut page = Page { name: name.to_owned(), code: Vec::new(), links: Vec::new() };
    let events: Vec<_> = Parser::new_ext(text, Options::ENABLE_TABLES).collect();
    let mut quote = false;
    let mut section: Option<HeadingLevel> = None;
    let mut heading = HeadingLevel::H1;
    let mut block: Option<(String, String)> = None;
    for (at, event) in events.iter().enumerate() {
        let place = match (quote, section) {
            (_, Some(_)) => Place::MarkedSection,
            (true, None) => Place::Marked,
            (false, None) => Place::Plain,
        };
        match event {
            Event::Start(Tag::Heading { level, .. }) => {
                heading = *level;
                // A section ends with the next heading that is not below its own.
                section = section.filter(|section| *level > *section);
            }
            Event::Start(Tag::BlockQuote(_)) => {
                let said = beginning(&events[at..]);
                assert!(said.starts_with(MARK), "{name}: a quotation that says something else: {said}");
                quote = true;
                if said.starts_with(SECTION_MARK) {
                    section = section.or(Some(heading));
                }
            }
            Event::End(TagEnd::BlockQuote(_)) => quote = false,
            Event::Start(Tag::CodeBlock(kind)) => {
                let CodeBlockKind::Fenced(language) = kind else { panic!("{name}: a block without a fence") };
                assert!(!language.is_empty(), "{name}: a block without a language");
                block = Some((language.to_string(), String::new()));
            }
            Event::End(TagEnd::CodeBlock) => {
                let (language, text) = block.take().unwrap();
                page.code.push(Code { text, language: Some(language), place });
            }
            Event::Text(piece) => {
                if let Some((_, text)) = &mut block {
                    text.push_str(piece);
                } else {
                    assert!(quote || !piece.contains("Not in this version"), "{name}: not in a quotation: {piece}");
                }
            }
            Event::Code(text) => page.code.push(Code { text: text.to_string(), language: None, place }),
            Event::Start(Tag::Link { dest_url, .. }) => page.links.push(dest_url.to_string()),
            Event::Html(html) | Event::InlineHtml(html) => panic!("{name}: HTML: {html}"),
            _ => {}
        }
    }
    page
}

/// The text of a paragraph that these events begin with.
fn beginning(events: &[Event<'_>]) -> String {
    let texts = events.iter().take_while(|event| !matches!(event, Event::End(TagEnd::Paragraph)));
    texts
        .filter_map(|event| match event {
            Event::Text(text) | Event::Code(text) => Some(text.as_ref()),
            Event::SoftBreak => Some(" "),
            _ => None,
        })
        .collect()
}

#[test]
fn marks_are_seen() {
    let page = read(
        "x",
        "# A\n`a`\n\n> Not in this version: `b`\n\n## B\n\n> Not in this version: this section. `c`\n\n`d`\n\n### C\n`e`\n\n## D\n`f` [l](y.md#z)\n\n```sh x\ng\n```\n",
    );
    let places: Vec<_> = page.code.iter().map(|code| (code.text.trim(), code.place)).collect();
    use Place::{Marked, MarkedSection, Plain};
    let want = [("a", Plain), ("b", Marked), ("c", MarkedSection), ("d", MarkedSection), ("e", MarkedSection)];
    assert_eq!(places[..5], want);
    assert_eq!(places[5..], [("f", Plain), ("g", Plain)]);
    assert_eq!(page.links, ["y.md#z"]);
    assert!(page.names("a") && !page.names("g") && page.blocks("sh x").count() == 1);
}
