//! Stage kind `command`: any shell command with declared inputs and outputs.
//!
//! The command sees `$PIPE_INPUT_<NAME>` and `$PIPE_OUTPUT_<NAME>` (upper case, `-` as `_`) and
//! runs in an empty folder of its own; only what it writes to its outputs is kept.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};

use contract::{
    Fault, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError, StageKind,
    parse_params,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Changes when the same params would run another command.
const VERSION: &str = "1";

/// The stage kind `command`.
pub struct Command;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Text handed to the shell; it sees `$PIPE_INPUT_NAME` and `$PIPE_OUTPUT_NAME`.
    run: String,
    /// Program that runs it with `-c`.
    #[serde(default = "shell")]
    shell: String,
    /// Outputs by name.
    #[serde(default)]
    outputs: BTreeMap<String, Output>,
    /// The command may make other bytes each time.
    #[serde(default)]
    nondeterministic: bool,
    /// What it takes of the host while it runs: `gpu: 2` so many GPUs, which are all that it sees;
    /// `"gpu:1": 1` that one, which the command must choose itself, since it sees all; any other name
    /// excludes stages that take it too.
    #[serde(default)]
    resources: BTreeMap<String, u32>,
}

/// `{file: NAME}` or `{dir: NAME}`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Output {
    /// Name of a file.
    File(String),
    /// Name of a folder.
    Dir(String),
}

fn shell() -> String {
    "sh".to_owned()
}

impl Output {
    fn name(&self) -> &str {
        match self {
            Self::File(name) | Self::Dir(name) => name,
        }
    }
}

impl StageKind for Command {
    fn name(&self) -> &'static str {
        "command"
    }

    fn summary(&self) -> &'static str {
        "runs a shell command with declared inputs and outputs"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        if params.run.trim().is_empty() {
            return Err(ParamError::at("run", "an empty command"));
        }
        let mut outputs = Vec::new();
        for (name, output) in &params.outputs {
            let at = format!("outputs.{name}");
            if !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
                return Err(ParamError::at(&at, "letters, digits, `-` and `_` only"));
            }
            if output.name().is_empty()
                || output.name().contains('/')
                || output.name().starts_with('.')
            {
                return Err(ParamError::at(&at, "a plain file name is needed here"));
            }
            outputs.push(match output {
                Output::File(file) => OutputSpec::file(name, file),
                Output::Dir(dir) => OutputSpec::tree(name, dir),
            });
        }
        let identity = json!({"run": params.run, "shell": params.shell, "outputs": params.outputs});
        Ok(Signature {
            identity,
            outputs,
            free_inputs: true,
            resources: params.resources.clone(),
            nondeterministic: params.nondeterministic,
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let work = request.scratch.join("work");
        // A killed attempt's leavings are no input of this one.
        let _ = fs::remove_dir_all(&work);
        fs::create_dir_all(&work).map_err(|e| StageError::io("create", &work, &e))?;
        reporter.log(format!("$ {}", params.run));
        for (name, output) in &params.outputs {
            if let Output::Dir(_) = output {
                let dir = request.output(name)?;
                fs::create_dir_all(dir).map_err(|e| StageError::io("create", dir, &e))?;
            }
        }
        let status = Process::new(&params.shell)
            .arg("-c")
            .arg(&params.run)
            .current_dir(&work)
            .envs(variables("INPUT", &request.inputs))
            .envs(variables("OUTPUT", &request.outputs))
            .env("PIPE_STAGE", &request.stage)
            .env("PIPE_PIPELINE_DIR", &request.pipeline_dir)
            .stdin(Stdio::null())
            .status()
            .map_err(|e| {
                let message = format!("could not start `{}`: {e}", params.shell);
                StageError::new(Fault::Environment, message)
            })?;
        let _ = fs::remove_dir_all(&work);
        if !status.success() {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                _ => "an unknown status".to_owned(),
            };
            return Err(StageError::input(format!("the command ended with {how}"))
                .help("the log has what it printed"));
        }
        for (name, output) in &params.outputs {
            if !request.output(name)?.exists() {
                let message =
                    format!("the command did not write its output `{name}` ({})", output.name());
                return Err(StageError::input(message)
                    .help(format!("write it to ${}", variable("OUTPUT", name))));
            }
        }
        Ok(Outcome::default())
    }
}

fn variable(role: &str, name: &str) -> String {
    format!("PIPE_{role}_{}", name.to_uppercase().replace('-', "_"))
}

fn variables<'a>(
    role: &'a str,
    paths: &'a BTreeMap<String, PathBuf>,
) -> impl Iterator<Item = (String, &'a PathBuf)> + 'a {
    paths.iter().map(move |(name, path)| (variable(role, name), path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn request(dir: &std::path::Path, run: &str) -> Request {
        let params = json!({"run": run, "outputs": {"out": {"file": "out.txt"}}});
        fixtures::request(&Command, &params, &[], dir)
    }

    #[test]
    fn command_writes_its_output() {
        let dir = tempfile::tempdir().unwrap();
        let request = request(dir.path(), "printf hello > \"$PIPE_OUTPUT_OUT\"");
        Command.run(&request, &mut Reporter::silent()).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("out.txt")).unwrap(), "hello");
    }

    #[test]
    fn failing_or_forgetful_command_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let run = |text| Command.run(&request(dir.path(), text), &mut Reporter::silent());
        assert!(run("exit 3").unwrap_err().message.contains("exit code 3"));
        assert!(run("true").unwrap_err().message.contains("did not write its output `out`"));
    }

    #[test]
    fn output_names_cannot_leave_their_folder() {
        let params = json!({"run": "x", "outputs": {"out": {"file": "../x"}}});
        assert_eq!(Command.resolve(&params).unwrap_err().path, ["outputs", "out"]);
    }
}
