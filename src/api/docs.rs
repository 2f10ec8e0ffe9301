//! The page at `/docs`: the document written out as HTML here, so that it needs no script and nothing from elsewhere.

use crate::api::pages::{self, escape};
use serde_json::Value;
use std::fmt::Write as _;

/// Writes the page of a document, which is given as the JSON that is served: the page is not kept.
pub(crate) fn page(json: &str) -> String {
    // What we serialized can be read; the page of `null` would be empty.
    let document: Value = serde_json::from_str(json).unwrap_or_default();
    let mut page = Page(pages::open("API", "/docs"));
    page.head(&document["info"]);
    page.routes(&document["paths"]);
    page.schemas(&document["components"]["schemas"]);
    page.0.push_str(pages::CLOSE);
    page.0
}

struct Page(String);

impl Page {
    fn put(&mut self, html: std::fmt::Arguments<'_>) {
        // Writing into a string does not fail.
        let _ = self.0.write_fmt(html);
    }

    fn head(&mut self, info: &Value) {
        let (title, version) = (text(&info["title"]), text(&info["version"]));
        self.put(format_args!(
            "<h1>{title} {version}</h1><p>{}</p><p><a href=\"/openapi.json\">openapi.json</a></p>",
            text(&info["description"])
        ));
    }

    fn routes(&mut self, paths: &Value) {
        let mut last_tag = None;
        let mut operations: Vec<(String, &str, &str, &Value)> = Vec::new();
        for (path, item) in paths.as_object().into_iter().flatten() {
            for (method, operation) in item.as_object().into_iter().flatten() {
                if operation.get("responses").is_some() {
                    let tag = operation["tags"][0].as_str().unwrap_or("other").to_owned();
                    operations.push((tag, path, method, operation));
                }
            }
        }
        operations.sort_by(|a, b| a.0.cmp(&b.0));
        for (tag, path, method, operation) in &operations {
            if last_tag != Some(tag) {
                self.put(format_args!("<h2>{}</h2>", escape(tag)));
                last_tag = Some(tag);
            }
            self.operation(path, &method.to_uppercase(), operation);
        }
    }

    fn operation(&mut self, path: &str, method: &str, operation: &Value) {
        let scope = &operation["security"][0]["bearer"][0];
        self.put(format_args!(
            "<details><summary><span class=\"m {method}\">{method}</span> <code>{}</code> {} <span class=k>{}</span>\
             </summary><p>{}</p>",
            escape(path),
            text(&operation["summary"]),
            scope.as_str().map_or("no credential".to_owned(), escape),
            text(&operation["description"]),
        ));
        let parameters = operation["parameters"].as_array();
        if let Some(parameters) = parameters.filter(|p| !p.is_empty()) {
            self.put(format_args!("<table><tr><th>parameter<th>in<th>type<th>"));
            for parameter in parameters {
                let required = if parameter["required"] == true { " (required)" } else { "" };
                self.put(format_args!(
                    "<tr><td><code>{}</code>{required}<td>{}<td>{}<td>{}",
                    text(&parameter["name"]),
                    text(&parameter["in"]),
                    schema_name(&parameter["schema"]),
                    text(&parameter["description"]),
                ));
            }
            self.put(format_args!("</table>"));
        }
        for (media, content) in operation["requestBody"]["content"].as_object().into_iter().flatten() {
            let (media, schema) = (escape(media), schema_name(&content["schema"]));
            self.put(format_args!("<p>Body: <code>{media}</code> {schema}</p>"));
        }
        self.put(format_args!("<table><tr><th>answer<th>type<th>"));
        for (status, response) in operation["responses"].as_object().into_iter().flatten() {
            let content = response["content"].as_object().into_iter().flatten();
            let types: Vec<_> =
                content.map(|(media, c)| format!("{} {}", escape(media), schema_name(&c["schema"]))).collect();
            let types = if response.get("$ref").is_some() { "problem document".to_owned() } else { types.join("<br>") };
            let status = escape(status);
            self.put(format_args!("<tr><td>{status}<td>{types}<td>{}", text(&response["description"])));
        }
        self.put(format_args!("</table></details>"));
    }

    fn schemas(&mut self, schemas: &Value) {
        self.put(format_args!("<h2>Schemas</h2>"));
        for (name, schema) in schemas.as_object().into_iter().flatten() {
            let name = escape(name);
            // Pretty JSON of a value does not fail.
            let json = serde_json::to_string_pretty(schema).unwrap_or_default();
            self.put(format_args!(
                "<details id=\"schema-{name}\"><summary><code>{name}</code> {}</summary><pre>{}</pre></details>",
                text(&schema["description"]),
                escape(&json)
            ));
        }
    }
}

/// A schema in a word: a link to a named one, else its type.
fn schema_name(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = escape(reference.rsplit('/').next().unwrap_or_default());
        return format!("<a href=\"#schema-{name}\">{name}</a>");
    }
    let kind = match &schema["type"] {
        Value::String(kind) => escape(kind),
        Value::Array(kinds) => kinds.iter().map(text).collect::<Vec<_>>().join(" or "),
        _ => String::new(),
    };
    match (kind.as_str(), schema["format"].as_str()) {
        ("array", _) => format!("list of {}", schema_name(&schema["items"])),
        (_, Some(format)) => format!("{kind} ({})", escape(format)),
        _ => kind,
    }
}

fn text(value: &Value) -> String {
    escape(value.as_str().unwrap_or_default())
}
