//! What a stage is once the records upstream are known: everything that can change its outputs.

use std::collections::BTreeMap;

use super::{PlanError, Planner, Records};
use crate::digest::{Digest, Fingerprint};
use crate::fingerprint::{Identity, SCHEMA};
use crate::gather;
use crate::lockfile::Lockfile;
use crate::pipeline::{InputRef, PipelineError, Problem, Stage};

impl Planner<'_> {
    /// Everything that can change the outputs of a stage.
    ///
    /// # Errors
    /// [`PlanError`] for a missing input.
    pub fn identity(
        &self,
        stage: &Stage,
        records: &Records,
        lock: &Lockfile,
    ) -> Result<Identity, PlanError> {
        let mut inputs: BTreeMap<String, Digest> = self.local_inputs(stage)?;
        for (name, input) in &stage.inputs {
            if let InputRef::Gathered(gathered) = &input.from {
                match gather::digest(gathered, records) {
                    Ok(digest) => inputs.extend([(name.clone(), digest)]),
                    Err(missing) => self.missing(stage, name, &missing, &gathered.output)?,
                }
                continue;
            }
            let InputRef::Output { stage: from, output } = &input.from else { continue };
            let made = records.get(from).and_then(|r| r.outputs.get(output));
            match made {
                Some(output) => inputs.extend([(name.clone(), output.identity())]),
                None => self.check_optional(stage, name, from, output)?,
            }
        }
        let mut upstream = BTreeMap::new();
        if stage.signature.reads_records {
            for name in self.upstream(stage) {
                if let Some(record) = records.get(&name) {
                    upstream.insert(name, record.fingerprint);
                }
            }
        }
        Ok(Self::without_inputs(stage, lock, inputs, upstream))
    }

    pub(super) fn without_inputs(
        stage: &Stage,
        lock: &Lockfile,
        inputs: BTreeMap<String, Digest>,
        upstream: BTreeMap<String, Fingerprint>,
    ) -> Identity {
        let env = stage.env.iter().map(|(name, value)| {
            let value = value.clone().or_else(|| std::env::var(name).ok());
            (name.clone(), value)
        });
        Identity {
            schema: SCHEMA,
            kind: stage.kind.clone(),
            version: stage.version.clone(),
            params: stage.signature.identity.clone(),
            inputs,
            env: env.collect(),
            lock: stage.signature.lock_key.as_ref().and_then(|k| lock.get(k)).cloned(),
            upstream,
        }
    }

    /// An upstream stage left an optional output out: fine where the input is optional too.
    fn check_optional(
        &self,
        stage: &Stage,
        input: &str,
        from: &str,
        output: &str,
    ) -> Result<(), PlanError> {
        let required = stage.signature.free_inputs
            || stage.signature.inputs.iter().any(|i| i.name == input && i.required);
        if required { self.missing(stage, input, from, output) } else { Ok(()) }
    }

    fn missing(
        &self,
        stage: &Stage,
        input: &str,
        from: &str,
        output: &str,
    ) -> Result<(), PlanError> {
        let place = stage.inputs[input].place;
        let problem = Problem::at(
            format!("stage `{}` needs `{from}.{output}`, which `{from}` did not make", stage.name),
            place,
            "needed here",
        )
        .help(format!("`{output}` is optional: the params of `{from}` say whether it is made"));
        Err(PipelineError::of(vec![problem], &self.pipeline.sources).into())
    }

    pub(super) fn local_inputs(
        &self,
        stage: &Stage,
    ) -> Result<BTreeMap<String, Digest>, PlanError> {
        let mut digests = BTreeMap::new();
        for (name, input) in &stage.inputs {
            let InputRef::Local(path) = &input.from else { continue };
            let full = self.pipeline.dir.join(path);
            if !full.exists() {
                let shown = path.display();
                let problem =
                    Problem::at(format!("no file or folder `{shown}`"), input.place, "needed here")
                        .help("paths are relative to the pipeline file");
                return Err(PipelineError::of(vec![problem], &self.pipeline.sources).into());
            }
            digests.insert(name.clone(), self.cache.digest_local(&full)?);
        }
        Ok(digests)
    }
}
