//! What a stage is: the one crate that engine and stages both know.
//!
//! A stage kind says what its params, inputs and outputs are ([`StageKind::resolve`]) and turns
//! one [`Request`] into files ([`StageKind::run`]). It never sees the cache; the engine never sees
//! a tensor.

mod error;
mod params;
mod progress;
mod request;
mod schema;
mod scratch;
mod signature;

pub use error::{Fault, StageError};
pub use params::{ParamError, parse_params};
pub use progress::{Progress, Reporter};
pub use request::{Outcome, Request, UpstreamRecord};
pub use schema::schema_of;
pub use scratch::{Checkpoints, ScratchError};
pub use signature::{InputSpec, OutputClass, OutputForm, OutputSpec, Signature};

/// Version of the JSON that engine and stage processes exchange.
pub const PROTOCOL: u32 = 1;

/// One kind of stage, registered by the binary under the name used as `kind:` in the YAML.
pub trait StageKind: Send + Sync {
    /// Name in the YAML, such as `tokenize-pack`.
    fn name(&self) -> &'static str;

    /// One line for `pipe kinds` and the docs.
    fn summary(&self) -> &'static str;

    /// Changes when the meaning of the outputs changes; part of every fingerprint. Composed of the
    /// kind's own `VERSION` and the `NUMERICS_VERSION` of the shared crates it computes with, as in
    /// `3+numerics.2`.
    fn version(&self) -> String;

    /// Validates params, fills defaults in, and says what the stage takes and makes.
    ///
    /// Pure: reads no file, no environment, no network.
    ///
    /// # Errors
    /// [`ParamError`] with the path of the offending key inside `params`.
    fn resolve(&self, params: &serde_json::Value) -> Result<Signature, ParamError>;

    /// JSON Schema of `params:`, for editors and `pipe kinds`: [`schema_of`] the struct that
    /// [`StageKind::resolve`] parses. The engine adds that variables may stand anywhere.
    fn params_schema(&self) -> serde_json::Value;

    /// Does the work, in a process of its own.
    ///
    /// Reads only `request.inputs`, writes only `request.outputs` and `request.scratch`.
    ///
    /// # Errors
    /// [`StageError`], shown to the user together with the end of the stage's log.
    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError>;
}
