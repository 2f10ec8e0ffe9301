//! The files of an execution: lists, contents, and what it changed.
//!
//! What they say is the agent's, and may be meant for whoever looks at it. So content goes out as plain text or as bytes,
//! for download, never as what its name says that it is, and no browser may run or keep it; and names are shown without
//! what would change how the text around them looks. A name that is none of the ordinary ones can still be asked for: each
//! entry has its path as the query takes it, byte for byte.

use crate::api::ApiQuery;
use crate::api::problem::{Code, Problem};
use crate::api::tasks::{TasksApi, find, limit_of, parse_id, unavailable};
use crate::events::ReadQuery;
use crate::executions::{Entry, FileError, FilePath, Files, FilesError, Kind, MAX_READERS, OpenFile};
use crate::model::event::EventType;
use crate::model::{ExecutionId, ExecutionRecord, Status, rfc3339, turns_text};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Datelike};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode, percent_encode};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Bytes of a file that are read, and held for a reader, at once.
const PIECE: usize = 128 * 1024;
/// What a path keeps as it is in a query.
const IN_QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// What a name keeps as it is in a header.
const IN_HEADER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The state of the file routes.
#[derive(Clone, Debug)]
pub struct FilesApi {
    pub tasks: TasksApi,
    /// `MAX_TASK_FILE_SIZE`, in bytes
    pub max_bytes: u64,
}

/// The file routes.
pub fn routes(api: FilesApi) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(content)).routes(routes!(diff)).with_state(api)
}

/// The execution, and the right to read its files.
async fn files_of(api: &FilesApi, id: &str) -> Result<Files, Problem> {
    let view = find(&api.tasks, parse_id(id)?).await?;
    api.tasks.executions.files(&view.record).map_err(files_problem)
}

fn files_problem(error: FilesError) -> Problem {
    let path = |why: &str| Problem::invalid_field("path", why);
    let error = match error {
        FilesError::Busy => {
            let most = format!("{MAX_READERS} requests read files, which is as many as may. Try again later.");
            return Problem::new(Code::Unavailable, most);
        }
        FilesError::Timeout => return Problem::unavailable("workspace", error),
        FilesError::File(error) => error,
    };
    match error {
        FileError::Path(why) => path(why),
        FileError::NoTree => Problem::new(Code::NotFound, "The execution's working directory is gone."),
        FileError::NotFound => {
            Problem::new(Code::NotFound, "There is nothing at this path in the execution's working directory.")
        }
        FileError::Link => path("is a symbolic link or leads through one, and those are not followed"),
        FileError::NotADirectory => path("is no directory, or leads through something that is none"),
        FileError::Directory => path("is a directory; GET /tasks/{execution_id}/files lists it"),
        FileError::Special => path("is a FIFO, a socket or a device, and only files are read"),
        FileError::Denied => Problem::new(Code::Conflict, "Its permissions keep the sidecar from reading it.")
            .field("path", "may not be read"),
        FileError::Held => Problem::new(Code::Unavailable, "A process holds the file. Try again later."),
        FileError::GivenUp | FileError::Failed(_) => Problem::internal(error),
    }
}

/// The bytes of the parameter `path`; those of no path at all where there is none. `ApiQuery` has seen the query already,
/// and that there is one `path` at most.
fn path_of(query: Option<&str>) -> Result<FilePath, Problem> {
    let decoded = |text: &str| percent_decode(text.replace('+', " ").as_bytes()).collect::<Vec<u8>>();
    let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let bytes = pairs.filter(|(name, _)| decoded(name) == b"path").map(|(_, value)| decoded(value)).next();
    FilePath::parse(&bytes.unwrap_or_default()).map_err(|error| files_problem(error.into()))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListParams {
    /// The directory, relative to the execution's working directory; without it that directory itself. At most 4096 bytes,
    /// without `..`. A percent-encoded byte need not be UTF-8.
    #[serde(rename = "path")]
    #[param(max_length = 4096, default = "")]
    _path: Option<String>,
    /// 1 to 1000.
    #[param(minimum = 1, maximum = 1000, default = 200)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ContentParams {
    /// The file, relative to the execution's working directory: as the `path` of its entry in the list, or of a `file` event.
    /// At most 4096 bytes, without `..`. A percent-encoded byte need not be UTF-8.
    #[serde(rename = "path")]
    #[param(min_length = 1, max_length = 4096)]
    _path: String,
}

/// What something in a directory is.
#[derive(Clone, Copy, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum FileType {
    File,
    Directory,
    /// Shown, never followed.
    Symlink,
    /// A FIFO, a socket or a device. Shown, never opened.
    Special,
}

/// Something in a directory.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct EntryDocument {
    /// For people to read: what is not UTF-8, control characters, and what turns the direction of text, are U+FFFD.
    name: String,
    /// For programs to ask for it: its path from the execution's working directory, ready to be put into a query
    /// (percent-encoded where it has to be).
    path: String,
    r#type: FileType,
    /// Of a file, in bytes.
    size: Option<u64>,
    /// RFC 3339; null for a time that has no such form.
    modified_at: Option<String>,
    /// Whether somebody may execute the file.
    executable: bool,
    /// Of a symbolic link: where it says that it leads, for people to read.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl EntryDocument {
    fn of(directory: &FilePath, entry: &Entry) -> Self {
        let (seconds, nanoseconds) = entry.modified;
        let modified = DateTime::from_timestamp(seconds, nanoseconds).filter(|time| (0..=9999).contains(&time.year()));
        Self {
            name: shown(&entry.name),
            path: percent_encode(&directory.join(&entry.name), IN_QUERY).to_string(),
            r#type: match entry.kind {
                Kind::File => FileType::File,
                Kind::Directory => FileType::Directory,
                Kind::Symlink => FileType::Symlink,
                Kind::Special => FileType::Special,
            },
            size: entry.size,
            modified_at: modified.map(rfc3339),
            executable: entry.executable,
            target: entry.target.as_deref().map(shown),
        }
    }
}

/// A name for people, who must not be deceived by it.
fn shown(name: &[u8]) -> String {
    // The second are the ends of a line and of a paragraph.
    let deceives = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') || turns_text(c);
    String::from_utf8_lossy(name).chars().map(|c| if deceives(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A page of a directory.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ListDocument {
    execution_id: ExecutionId,
    /// The directory, as `path` of an entry is written; empty for the working directory.
    path: String,
    /// In the order of their names' bytes.
    entries: Vec<EntryDocument>,
    next_cursor: Option<String>,
}

/// What is in a directory of the workspace
///
/// A page of a directory beneath the execution's working directory (`workdir`, or the whole workspace), while it runs and
/// after, as it is now. The order is that of the names' bytes; what comes or goes while you page is there or not, and
/// nothing else is missing or doubled. Each page costs reading the whole directory once. After the working directory is gone
/// it is a 404 that says so.
#[utoipa::path(
    get, path = "/tasks/{execution_id}/files", tag = "files", security(("bearer" = ["files:read"])),
    params(("execution_id" = ExecutionId, Path), ListParams),
    responses((status = 200, body = ListDocument)),
)]
async fn list(
    State(api): State<FilesApi>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    ApiQuery(params): ApiQuery<ListParams>,
) -> Result<Json<ListDocument>, Problem> {
    let limit = limit_of(params.limit, 200, 1000)? as usize;
    let wrong = |_| Problem::invalid_field("cursor", "must be the next_cursor of an earlier page");
    let after = params.cursor.map(|cursor| URL_SAFE_NO_PAD.decode(cursor)).transpose().map_err(wrong)?;
    let path = path_of(query.as_deref())?;
    let files = files_of(&api, &id).await?;
    let listing = files.list(path.clone(), after, limit).await.map_err(files_problem)?;
    Ok(Json(ListDocument {
        execution_id: parse_id(&id)?,
        path: percent_encode(path.as_bytes(), IN_QUERY).to_string(),
        entries: listing.entries.iter().map(|entry| EntryDocument::of(&path, entry)).collect(),
        next_cursor: listing.next.map(|name| URL_SAFE_NO_PAD.encode(name)),
    }))
}

/// The content of a file
///
/// For download, as it is now: `text/plain; charset=utf-8` where its first 8 KiB are UTF-8 without a NUL, else
/// `application/octet-stream`. One answer holds at most `MAX_TASK_FILE_SIZE` bytes: a larger file is read by ranges
/// (`Range: bytes=0-999999`, `bytes=1000000-`, `bytes=-500`; several at once are not taken, and give the whole file). `ETag`
/// goes with the file's state; with `If-Range` a range of another state is not mixed in. What is written while it is read
/// may be of both states; where the file becomes shorter than what was announced, the answer is cut.
#[utoipa::path(
    get, path = "/tasks/{execution_id}/files/content", tag = "files", security(("bearer" = ["files:read"])),
    params(
        ("execution_id" = ExecutionId, Path), ContentParams,
        ("Range" = Option<String>, Header, description = "One range of bytes (RFC 9110)"),
        ("If-Range" = Option<String>, Header, description = "The `ETag` that the range is for; with another one the whole file is answered"),
    ),
    responses(
        (status = 200, description = "The whole file", content(
            (Vec<u8> = "application/octet-stream"), (String = "text/plain"),
        ), headers(("ETag" = String, description = "The file's state"), ("Accept-Ranges" = String, description = "`bytes`"))),
        (status = 206, description = "The range", content(
            (Vec<u8> = "application/octet-stream"), (String = "text/plain"),
        ), headers(("ETag" = String, description = "The file's state"), ("Content-Range" = String, description = "`bytes <first>-<last>/<size>`"))),
        (status = 413, description = "The file, or the range, is larger than `MAX_TASK_FILE_SIZE`", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
        (status = 416, description = "The range begins behind the end; `Content-Range` has the size", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
    ),
)]
async fn content(
    State(api): State<FilesApi>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    ApiQuery(_params): ApiQuery<ContentParams>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let path = path_of(query.as_deref())?;
    let files = files_of(&api, &id).await?;
    let file = files.open(path.clone()).await.map_err(files_problem)?;
    let (size, tag) = (file.size(), format!("\"{}\"", file.version()));
    let range = match wanted_range(&headers, &tag) {
        None => None,
        Some(wanted) => match wanted.of(size) {
            Some(range) => Some(range),
            None => return Ok(beyond(size)),
        },
    };
    let (status, bytes) = match &range {
        Some(range) => (StatusCode::PARTIAL_CONTENT, range.clone()),
        None => (StatusCode::OK, 0..size),
    };
    let length = bytes.end - bytes.start;
    if length > api.max_bytes {
        let what = if range.is_some() { "The range" } else { "The file" };
        let detail = format!(
            "{what} has {length} bytes, and one answer at most {} (MAX_TASK_FILE_SIZE). Ask for ranges of it.",
            api.max_bytes
        );
        return Err(Problem::new(Code::FileTooLarge, detail));
    }
    let kind = if file.is_text() { "text/plain; charset=utf-8" } else { "application/octet-stream" };
    let mut response = (status, body(files, file, bytes.clone())).into_response();
    let headers = response.headers_mut();
    let name = shown(path.name());
    let name = percent_encode(name.as_bytes(), IN_HEADER);
    set(headers, header::CONTENT_TYPE, kind);
    set(headers, header::CONTENT_LENGTH, &length.to_string());
    set(headers, header::CONTENT_DISPOSITION, &format!("attachment; filename*=UTF-8''{name}"));
    set(headers, header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox");
    set(headers, header::ACCEPT_RANGES, "bytes");
    set(headers, header::ETAG, &tag);
    if status == StatusCode::PARTIAL_CONTENT {
        // None is empty.
        set(headers, header::CONTENT_RANGE, &format!("bytes {}-{}/{size}", bytes.start, bytes.end - 1));
    }
    Ok(response)
}

/// 416, with the size that the range is behind.
fn beyond(size: u64) -> Response {
    let detail = format!("The range begins behind the end of the file, which has {size} bytes.");
    let mut response = Problem::new(Code::RangeNotSatisfiable, detail).into_response();
    set(response.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{size}"));
    response
}

/// All of them can be headers.
fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The bytes of a file, piece by piece. Cut where the file ends before them.
fn body(files: Files, file: Arc<OpenFile>, bytes: Range<u64>) -> Body {
    let pieces = async_stream::try_stream! {
        let mut at = bytes.start;
        while at < bytes.end {
            let left = usize::try_from(bytes.end - at).unwrap_or(PIECE);
            let piece = files.read(&file, at, left.min(PIECE)).await.map_err(std::io::Error::other)?;
            if piece.is_empty() {
                Err(std::io::Error::other("the file has become shorter"))?;
            }
            at += piece.len() as u64;
            yield Bytes::from(piece);
        }
    };
    let pieces: std::pin::Pin<Box<dyn futures_util::Stream<Item = std::io::Result<Bytes>> + Send>> = Box::pin(pieces);
    Body::from_stream(pieces)
}

/// A range as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// From one byte to another, which belongs to it.
    Between(u64, u64),
    /// The last so many.
    Last(u64),
}

impl Wanted {
    /// The one range that a value asks for. `None` for what has to be ignored (RFC 9110, 14.2): another unit, what is not
    /// well formed; and for several, which need not be taken. The crate `http-range-header` is not used, since it
    /// takes a suffix that is longer than the file for a mistake.
    fn parse(value: &str) -> Option<Self> {
        let (unit, range) = value.split_once('=')?;
        let (first, last) = range.trim().split_once('-')?;
        let number = |digits: &str| match digits.bytes().all(|byte| byte.is_ascii_digit()) {
            // More than there can be is as good as the most.
            true if !digits.is_empty() => Some(digits.parse().unwrap_or(u64::MAX)),
            _ => None,
        };
        let wanted = match (first, last) {
            ("", last) => Self::Last(number(last)?),
            (first, "") => Self::Between(number(first)?, u64::MAX),
            (first, last) => Self::Between(number(first)?, number(last)?),
        };
        let backwards = matches!(wanted, Self::Between(first, last) if first > last);
        (unit.trim().eq_ignore_ascii_case("bytes") && !backwards).then_some(wanted)
    }

    /// What it is of a file of this size; `None` where there is nothing of it. Never empty.
    fn of(self, size: u64) -> Option<Range<u64>> {
        let range = match self {
            Self::Between(first, last) => first..last.saturating_add(1).min(size),
            Self::Last(count) => size.saturating_sub(count)..size,
        };
        (range.start < range.end).then_some(range)
    }
}

/// The range that a request asks for, where it is of the file's present state.
fn wanted_range(headers: &HeaderMap, tag: &str) -> Option<Wanted> {
    let mut values = headers.get_all(header::RANGE).iter();
    let wanted = Wanted::parse(values.next()?.to_str().ok()?)?;
    let same = headers.get(header::IF_RANGE).is_none_or(|state| state.as_bytes() == tag.as_bytes());
    (same && values.next().is_none()).then_some(wanted)
}

/// What is known of the changes.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum Basis {
    /// The working directory is in a git repository: what is different in it, whoever changed it, but for what git ignores
    /// and for new files over 2 MiB. A patch can be applied.
    Snapshots,
    /// What the agent's file tools did. What shell commands changed is not in it. A patch is to be read, and not to be
    /// applied: indentation that all its lines have is left out.
    FileTools,
}

/// A change of one file.
#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
struct DiffFile {
    /// Relative to the working directory; with `snapshots` to the top of the repository.
    path: String,
    /// `added`, `modified`, `deleted`; null where it is not known.
    change: Option<String>,
    /// A unified diff. Null for what has none (binary, empty), for a file that was written over, and for what is too large.
    patch: Option<String>,
    additions: Option<u64>,
    deletions: Option<u64>,
}

/// What an execution changed.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct DiffDocument {
    execution_id: ExecutionId,
    status: Status,
    /// Null as long as nothing is known but the names.
    basis: Option<Basis>,
    /// These are all changes there are on this basis. False while it runs, after an end that was no good one, after a
    /// restart in between, and where something was too large or too much.
    complete: bool,
    /// In order. A file may be there more than once: each time it goes on from the time before.
    files: Vec<DiffFile>,
}

/// What an execution changed in its working directory
///
/// As its log has it (the event `diff`, at the end), so it stays when the files change again or are gone. `basis` says what
/// is seen. What another session did in the same directory at the same time is not told apart. While it runs, the files that
/// are known to be changed, without their patches.
#[utoipa::path(
    get, path = "/tasks/{execution_id}/diff", tag = "files", security(("bearer" = ["files:read"])),
    params(("execution_id" = ExecutionId, Path)),
    responses((status = 200, body = DiffDocument)),
)]
async fn diff(State(api): State<FilesApi>, Path(id): Path<String>) -> Result<Json<DiffDocument>, Problem> {
    #[derive(Deserialize)]
    struct Told {
        data: Diff,
    }
    #[derive(Deserialize)]
    struct Diff {
        basis: Basis,
        complete: bool,
        files: Vec<DiffFile>,
    }
    let id = parse_id(&id)?;
    let view = find(&api.tasks, id).await?;
    let log = api.tasks.executions.events();
    let mut told = Vec::new();
    let mut after = 0;
    while after < view.last_seq {
        let query = ReadQuery { after, limit: 100, types: Some(vec![EventType::Diff]), severities: None };
        let page = log.read(id, view.last_seq, &query).await.map_err(unavailable)?;
        for event in page.events {
            let Told { data } = serde_json::from_str(&event.json).map_err(Problem::internal)?;
            told.push(data);
        }
        if page.next_after <= after {
            break;
        }
        after = page.next_after;
    }
    let record = &view.record;
    let well = record.status == Status::Completed && record.generation == std::num::NonZeroU32::MIN;
    Ok(Json(if told.is_empty() {
        let files = unexplained(record);
        let complete = well && files.is_empty();
        let basis = complete.then_some(Basis::FileTools);
        DiffDocument { execution_id: id, status: record.status, basis, complete, files }
    } else {
        DiffDocument {
            execution_id: id,
            status: record.status,
            basis: told.last().map(|diff| diff.basis),
            complete: well && told.iter().all(|diff| diff.complete),
            files: told.into_iter().flat_map(|diff| diff.files).collect(),
        }
    }))
}

/// The files that are known to be changed, and no more of them.
fn unexplained(record: &ExecutionRecord) -> Vec<DiffFile> {
    let named =
        |path: &String| DiffFile { path: path.clone(), change: None, patch: None, additions: None, deletions: None };
    record.files_modified.iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_taken_as_it_is_written() {
        for (value, size, want) in [
            ("bytes=0-0", 10, Some(0..1)),
            ("bytes=2-5", 10, Some(2..6)),
            ("bytes=2-", 10, Some(2..10)),
            ("bytes=2-99999999999999999999999", 10, Some(2..10)),
            ("bytes=-3", 10, Some(7..10)),
            ("bytes=-30", 10, Some(0..10)),
            ("Bytes= 007-08", 10, Some(7..9)),
            // Nothing is there.
            ("bytes=10-", 10, None),
            ("bytes=99999999999999999999999-", 10, None),
            ("bytes=-0", 10, None),
            ("bytes=0-", 0, None),
            ("bytes=-5", 0, None),
        ] {
            assert_eq!(Wanted::parse(value).unwrap().of(size), want, "{value} of {size}");
        }
        for ignored in
            ["", "bytes", "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "bytes=+1-2", "bytes=a-b"]
        {
            assert_eq!(Wanted::parse(ignored), None, "{ignored}");
        }
    }

    #[test]
    fn a_path_is_taken_byte_for_byte() {
        let of = |query: &str| path_of(Some(query)).unwrap().as_bytes().to_vec();
        assert_eq!(path_of(None).unwrap().as_bytes(), b"");
        assert_eq!(of("limit=1&path=a%2Fb+c%ff%0A&cursor=x"), b"a/b c\xff\n");
        assert_eq!(of("p%61th=x"), b"x");
        for bad in ["path=%00", "path=/etc", "path=%2e%2e", "path=a/../b"] {
            let problem = path_of(Some(bad)).unwrap_err();
            assert_eq!(problem.code(), Code::InvalidField, "{bad}");
            assert!(problem.detail().starts_with("path: "), "{bad}");
        }
    }

    #[test]
    fn a_path_in_a_list_is_what_can_be_asked_for() {
        let name = b"a b\n\xff\xe2\x80\xae&=+%c";
        let entry = Entry {
            name: name.to_vec(),
            kind: Kind::File,
            size: Some(1),
            modified: (i64::MAX, 0),
            executable: false,
            target: None,
        };
        let shown = EntryDocument::of(&FilePath::parse(b"d/").unwrap(), &entry);
        assert_eq!(shown.name, "a b\u{fffd}\u{fffd}\u{fffd}&=+%c");
        assert_eq!(shown.modified_at, None);
        assert!(shown.path.is_ascii());
        assert_eq!(path_of(Some(&format!("path={}", shown.path))).unwrap().as_bytes(), [b"d/", &name[..]].concat());
    }
}
