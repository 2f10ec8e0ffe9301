//! The pages for people: the Markdown of `docs/`, written out as HTML when somebody asks for it.
//!
//! Nothing is kept: a page is read once in a while, and the memory of an idle sidecar counts. The texts are part of
//! the binary, so that they are those of its version. How a page looks, and what it may load, holds for
//! [`crate::api::docs`] too.

use pulldown_cmark::{CowStr, Event, HeadingLevel, Options, Parser, Tag, TagEnd};
use std::collections::HashMap;
use std::fmt::Write as _;

/// The content security policy of every page: its own style and nothing else.
pub(crate) const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = "body{font:16px/1.55 system-ui,sans-serif;max-width:56rem;margin:0 auto 4rem;padding:0 1rem;\
color:#1b1f24;background:#fff;overflow-wrap:break-word}code,pre{font:13px/1.5 ui-monospace,monospace}\
h1{margin-top:1.5rem}h2{margin-top:2.5rem}h3{margin-top:1.8rem}a{color:#0a58ca}\
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:.8rem 0;border-bottom:1px solid #d0d7de}\
nav [aria-current]{font-weight:700;color:inherit;text-decoration:none}.a{visibility:hidden;margin-left:.4rem;\
text-decoration:none}:hover>.a,.a:focus{visibility:visible}\
pre{overflow-x:auto;padding:.7rem .9rem;border-radius:6px;background:#f4f6f8}:not(pre)>code{padding:.1em .3em;\
border-radius:4px;background:#f4f6f8}blockquote{margin:1rem 0;padding:.1rem 1rem;border-left:4px solid #bf8700;\
background:#fff8e5}details{border:1px solid #d0d7de;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem;\
overflow-x:auto}summary{cursor:pointer}\
.m{display:inline-block;min-width:4.5em;font-weight:700}.GET{color:#0a58ca}.POST{color:#18794e}.DELETE{color:#b42318}\
.PUT,.PATCH{color:#9a6700}table{display:block;overflow-x:auto;border-collapse:collapse}td,th{text-align:left;\
padding:.25rem .8rem .25rem 0;vertical-align:top;border-bottom:1px solid #eaeef2}.k{float:right;color:#57606a}\
@media(max-width:40rem){thead{display:none}tbody,tr,td{display:block}td{padding:.1rem 0;border:0}\
tr{padding:.5rem 0;border-bottom:1px solid #8888}td:first-child{font-weight:600}}\
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}nav,details,td,th{border-color:#30363d}\
pre,:not(pre)>code{background:#161b22}blockquote{background:#272115}\
a,.GET{color:#79b8ff}.POST{color:#56d364}.DELETE{color:#ff7b72}.PUT,.PATCH{color:#e3b341}.k{color:#8b949e}}";

/// A page: its name in the path, the word for it in the navigation, its Markdown.
struct Source {
    name: &'static str,
    word: &'static str,
    text: &'static str,
}

macro_rules! sources {
    ($($name:literal $word:literal),+ $(,)?) => {
        &[$(Source { name: $name, word: $word, text: include_str!(concat!("../../docs/", $name, ".md")) }),+]
    };
}

const SOURCES: &[Source] = sources![
    "guide" "Guide",
    "recipes" "Recipes",
    "faq" "FAQ",
    "troubleshooting" "Troubleshooting",
    "integration" "Integration",
    "operations" "Operations",
    "threat-model" "Threat model",
];

/// The names of all pages, as in their paths.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|source| source.name)
}

/// The head of a page and the way to the others. `current` is the page's own path; the body stays open.
pub(crate) fn open(title: &str, current: &str) -> String {
    let mut page = format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport \
         content=\"width=device-width,initial-scale=1\"><title>{} · opencode-sidecar</title><style>{STYLE}</style>\
         </head><body><nav aria-label=\"Documentation\">",
        escape(title)
    );
    let mut link = |path: &str, word: &str| {
        let here = if path == current { " aria-current=page" } else { "" };
        // Writing into a string does not fail.
        let _ = write!(page, "<a href=\"{path}\"{here}>{word}</a>");
    };
    link("/docs", "API");
    for source in SOURCES {
        link(&format!("/docs/{}", source.name), source.word);
    }
    page.push_str("</nav><main>");
    page
}

/// What closes a page.
pub(crate) const CLOSE: &str = "</main></body></html>\n";

/// Writes the page of this name; `None` where there is none.
pub(crate) fn page(name: &str) -> Option<String> {
    let source = SOURCES.iter().find(|source| source.name == name)?;
    let mut page = open(source.word, &format!("/docs/{name}"));
    render(source.text, &mut page);
    page.push_str(CLOSE);
    Some(page)
}

/// Markdown into HTML: headings get the anchors that they have on a code host, links to other pages lead to where
/// those are served, and HTML in the text is shown, not obeyed.
fn render(text: &str, page: &mut String) {
    let parsed = || Parser::new_ext(text, Options::ENABLE_TABLES);
    let headings = headings(parsed());
    let mut coming = headings.iter();
    let mut open: Option<&Heading> = None;
    let mut contents = contents(&headings);
    let events = parsed().flat_map(|event| match event {
        Event::Start(Tag::Heading { level, classes, attrs, .. }) => {
            open = coming.next();
            let id = open.map(|heading| CowStr::from(heading.anchor.clone()));
            // The list of sections stands before the first of them.
            let before = if level == HeadingLevel::H2 { contents.take().map(html) } else { None };
            [before, Some(Event::Start(Tag::Heading { level, id, classes, attrs }))]
        }
        Event::End(TagEnd::Heading(_)) => {
            let link = open.map(|Heading { anchor, .. }| {
                html(format!("<a class=a href=\"#{anchor}\" aria-label=\"Link to this section\">#</a>"))
            });
            [link, Some(event)]
        }
        Event::Start(Tag::Link { link_type, dest_url, title, id }) => {
            let dest_url = served_at(&dest_url).map_or(dest_url, CowStr::from);
            [Some(Event::Start(Tag::Link { link_type, dest_url, title, id })), None]
        }
        Event::Html(text) | Event::InlineHtml(text) => [Some(Event::Text(text)), None],
        event => [Some(event), None],
    });
    pulldown_cmark::html::push_html(page, events.flatten());
}

fn html(text: String) -> Event<'static> {
    Event::InlineHtml(text.into())
}

struct Heading {
    level: HeadingLevel,
    text: String,
    /// Unique on its page.
    anchor: String,
}

fn headings<'a>(events: impl Iterator<Item = Event<'a>>) -> Vec<Heading> {
    let mut found: Vec<Heading> = Vec::new();
    let mut times: HashMap<String, usize> = HashMap::new();
    let mut inside = false;
    for event in events {
        match event {
            Event::Start(Tag::Heading { level, .. }) => {
                inside = true;
                found.push(Heading { level, text: String::new(), anchor: String::new() });
            }
            Event::End(TagEnd::Heading(_)) => {
                inside = false;
                if let Some(heading) = found.last_mut() {
                    let anchor = anchor(&heading.text);
                    let before = times.entry(anchor.clone()).or_default();
                    heading.anchor = if *before == 0 { anchor } else { format!("{anchor}-{before}") };
                    *before += 1;
                }
            }
            Event::Text(text) | Event::Code(text) if inside => {
                if let Some(heading) = found.last_mut() {
                    heading.text.push_str(&text);
                }
            }
            _ => {}
        }
    }
    found
}

/// A heading's anchor as code hosts make it: lower case, spaces to hyphens, no other punctuation than `-` and `_`.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The list of a page's sections; `None` where a list would be of no use.
fn contents(headings: &[Heading]) -> Option<String> {
    let sections: Vec<_> = headings.iter().filter(|heading| heading.level == HeadingLevel::H2).collect();
    if sections.len() < 3 {
        return None;
    }
    let mut list = String::from("<details open><summary>On this page</summary><ul>");
    for Heading { anchor, text, .. } in sections {
        // Writing into a string does not fail.
        let _ = write!(list, "<li><a href=\"#{anchor}\">{}</a>", escape(text));
    }
    list.push_str("</ul></details>");
    Some(list)
}

/// Where a link between the files of `docs/` leads on the sidecar: `guide.md#limits` to `/docs/guide#limits`.
fn served_at(link: &str) -> Option<String> {
    let (file, fragment) = link.find('#').map_or((link, ""), |at| link.split_at(at));
    let name = file.strip_suffix(".md").filter(|name| names().any(|known| known == *name))?;
    Some(format!("/docs/{name}{fragment}"))
}

/// Text as it may stand in HTML, also in an attribute.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape("<a href=\"x\">'&'</a>"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;");
    }

    #[test]
    fn anchors_are_those_of_code_hosts() {
        for (heading, want) in [
            ("Limits", "limits"),
            ("`GET /tasks`: the history", "get-tasks-the-history"),
            ("What's new? 2 things", "whats-new-2-things"),
            ("model_error", "model_error"),
        ] {
            assert_eq!(headings(Parser::new(&format!("# {heading}"))).remove(0).anchor, want);
        }
        let same: Vec<_> = headings(Parser::new("# a\n# a\n## A\n")).into_iter().map(|h| h.anchor).collect();
        assert_eq!(same, ["a", "a-1", "a-2"]);
    }

    #[test]
    fn markdown_becomes_a_page() {
        let mut page = String::new();
        render(
            "# T <b>\n\n## One\n\n[l](faq.md#x) [m](other.md) <i>\n\n<script></script>\n\n## Two `c`\n\n## Two `c`\n",
            &mut page,
        );
        assert!(page.contains("<h1 id=\"t-\">T &lt;b&gt;"), "{page}");
        assert!(page.contains("<a href=\"/docs/faq#x\">l</a> <a href=\"other.md\">m</a> &lt;i&gt;"), "{page}");
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script"), "{page}");
        assert!(page.contains("<li><a href=\"#two-c-1\">Two c</a>"), "{page}");
        let (list, sections) = page.split_once("</details>").unwrap();
        assert!(list.contains("On this page") && !list.contains("<h2"), "{page}");
        assert!(sections.contains("<h2 id=\"two-c-1\">Two <code>c</code><a class=a href=\"#two-c-1\""), "{page}");
    }
}
