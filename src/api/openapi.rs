//! Routes and document from one place: who adds a route, documents it.

use crate::api::auth::{self, Auth, Guard, Scope, Table, Unscoped};
use crate::api::layers::{self, Around, EdgeLimits};
use crate::api::probes;
use crate::api::probes::{Probes, Served};
use crate::api::problem::ProblemDocument;
use axum::{Extension, Router, middleware};
use http::Method;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder, SecurityRequirement,
    ServerBuilder,
};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;

/// The name of the security scheme.
const BEARER: &str = "bearer";
/// The name of the error response that each operation refers to.
const PROBLEM: &str = "Problem";
/// The name of the answer to a head that is too large.
const HEAD_TOO_LARGE: &str = "HeadTooLarge";

/// All routes beside the probes, by what the edge does for them. States are filled in.
#[derive(Default)]
#[expect(missing_debug_implementations, reason = "a router has none")]
pub struct Routes {
    /// Ordinary routes: a credential is required, and the answer must begin in time.
    pub protected: OpenApiRouter,
    /// Streams: no time limit, and **they refuse by themselves** (`Admission`), since a WebSocket may send its credential
    /// as its first frame. The document says that they need one.
    pub streams: OpenApiRouter,
}

/// What the edge itself needs.
#[derive(Clone, Debug)]
pub struct Edge {
    pub auth: Auth,
    pub probes: Probes,
    pub limits: EdgeLimits,
    /// `METRICS_AUTH=required`.
    pub metrics_auth: bool,
}

/// The document's frame: what it says without any route.
fn frame() -> OpenApi {
    let info = InfoBuilder::new()
        .title("opencode-sidecar")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Runs coding tasks in real OpenCode processes, streams what happens, and keeps the history."))
        .build();
    let server = ServerBuilder::new().url("/").description(Some("The sidecar in the project's pod, port 3003")).build();
    let mut http = Http::new(HttpAuthScheme::Bearer);
    http.description = Some(
        "`OPENCODE_SHARED_SECRET`, which has all scopes; or a JWT for the audience `opencode-sidecar` and this `project_id` \
         with the `scope` that an operation names, and perhaps for one `execution_id` alone. A browser's WebSocket offers \
         the subprotocols `opencode.stream.v1` and `bearer.<base64url of the token>`, or sends \
         `{\"type\":\"auth\",\"token\"}` first."
            .to_owned(),
    );
    let mut components = Components::new();
    components.add_security_scheme(BEARER, SecurityScheme::Http(http));
    let mut schemas = vec![(ProblemDocument::name().into_owned(), ProblemDocument::schema())];
    ProblemDocument::schemas(&mut schemas);
    components.schemas.extend(schemas);
    let problem = Ref::from_schema_name(ProblemDocument::name());
    let response = ResponseBuilder::new()
        .description("An error (RFC 9457)")
        .content("application/problem+json", ContentBuilder::new().schema(Some(problem)).build())
        .build();
    components.responses.insert(PROBLEM.to_owned(), RefOr::T(response));
    let bare = ResponseBuilder::new().description("The request's line and headers are too large. There is no body");
    components.responses.insert(HEAD_TOO_LARGE.to_owned(), RefOr::T(bare.build()));
    OpenApiBuilder::new().info(info).servers(Some([server])).components(Some(components)).build()
}

/// The operations of a path.
pub(crate) fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, options, head, patch, trace, .. } = item;
    [get, put, post, delete, options, head, patch, trace].into_iter().flatten()
}

/// Adds to each operation what holds for all of a group.
fn complete(mut document: OpenApi, secured: bool) -> OpenApi {
    let problem = || RefOr::Ref(Ref::from_response_name(PROBLEM));
    for operation in document.paths.paths.values_mut().flat_map(operations) {
        let responses = &mut operation.responses.responses;
        responses.entry("default".to_owned()).or_insert_with(problem);
        // By who reads requests, before anybody looks at them.
        let bare = || RefOr::Ref(Ref::from_response_name(HEAD_TOO_LARGE));
        responses.entry("431".to_owned()).or_insert_with(bare);
        if secured {
            for status in ["401", "403"] {
                responses.entry(status.to_owned()).or_insert_with(problem);
            }
        } else {
            // An empty list: none, also where a default is set one day.
            operation.security = Some(Vec::new());
        }
    }
    document
}

/// The scope of each operation of a group that needs a credential.
fn scopes(document: &OpenApi) -> Result<Vec<(String, Method, Scope)>, Unscoped> {
    let mut found = Vec::new();
    for (path, item) in &document.paths.paths {
        for (method, operation) in methods(item) {
            let scope = operation.security.as_deref().and_then(scope_of);
            let scope = scope.ok_or_else(|| Unscoped(format!("{method} {path}")))?;
            found.push((path.clone(), method, scope));
        }
    }
    Ok(found)
}

/// The one scope that a requirement names.
fn scope_of(requirements: &[SecurityRequirement]) -> Option<Scope> {
    let [requirement] = requirements else { return None };
    let requirement = serde_json::to_value(requirement).ok()?;
    let [scope] = requirement.get(BEARER)?.as_array()?.as_slice() else { return None };
    Scope::parse(scope.as_str()?)
}

/// Joins all routes into the sidecar's router, and all their documents into the one that it serves.
///
/// Every route is wrapped: request id, log line, metrics, panics, headers. Unknown paths are a 404, wrong methods a
/// 405, both as problem documents.
///
/// # Errors
/// An operation beside the probes that does not say which scope it needs.
pub fn assemble(edge: &Edge, routes: Routes) -> Result<(Router, OpenApi), Unscoped> {
    let (mut open, mut protected) = (probes::routes(edge.probes.clone()), routes.protected);
    let metrics = probes::metrics_route(edge.probes.clone());
    match edge.metrics_auth {
        true => protected = protected.merge(metrics),
        false => open = open.merge(metrics),
    }
    let (open, open_document) = open.split_for_parts();
    let (protected, protected_document) = protected.split_for_parts();
    let (streams, streams_document) = routes.streams.split_for_parts();
    let table = Table::of([scopes(&protected_document)?, scopes(&streams_document)?].concat());
    let guard = Guard { auth: edge.auth.clone(), table };

    let mut document = frame();
    document.merge(complete(open_document, false));
    document.merge(complete(protected_document, true));
    document.merge(complete(streams_document, true));

    let served = Served { json: document.to_json().unwrap_or_default().into() };
    let time_limit = middleware::from_fn_with_state(edge.limits.request, layers::time_limit);
    let around = Around { limits: edge.limits, metrics: edge.probes.metrics.clone() };

    // The wrong method on a protected route is refused like the right one, so its 405 comes beneath the layer.
    let open = open
        .method_not_allowed_fallback(layers::method_not_allowed)
        .layer(Extension(served))
        .route_layer(time_limit.clone());
    let protected = layered(protected.method_not_allowed_fallback(layers::method_not_allowed), |router| {
        router.route_layer(middleware::from_fn_with_state(guard.clone(), auth::require)).route_layer(time_limit)
    });
    let streams = layered(streams.method_not_allowed_fallback(layers::method_not_allowed), |router| {
        router.route_layer(middleware::from_fn_with_state(guard, auth::judge))
    });
    let router = open
        .merge(protected)
        .merge(streams)
        .fallback(layers::not_found)
        .layer(middleware::from_fn_with_state(around, layers::around));
    Ok((router, document))
}

/// `route_layer` refuses a router without routes.
fn layered(router: Router, layer: impl FnOnce(Router) -> Router) -> Router {
    if router.has_routes() { layer(router) } else { router }
}

/// The operations of a path, by method.
fn methods(item: &PathItem) -> impl Iterator<Item = (Method, &Operation)> {
    let methods = [
        (Method::GET, &item.get),
        (Method::PUT, &item.put),
        (Method::POST, &item.post),
        (Method::DELETE, &item.delete),
        (Method::PATCH, &item.patch),
        (Method::HEAD, &item.head),
        (Method::OPTIONS, &item.options),
        (Method::TRACE, &item.trace),
    ];
    methods.into_iter().filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

/// Every operation of a document: method and path, as `GET /tasks`.
pub fn operations_of(document: &OpenApi) -> Vec<String> {
    let paths = document.paths.paths.iter();
    paths.flat_map(|(path, item)| methods(item).map(move |(method, _)| format!("{method} {path}"))).collect()
}
