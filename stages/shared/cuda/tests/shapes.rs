//! Gradients of the GPU against the CPU's, whose own are Burn's, on random shapes of every family;
//! needs a GPU, else it is skipped.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

#[path = "../../model/tests/random_model/mod.rs"]
mod random_model;

use std::path::Path;

use cuda::{Activations, Device, Dtype, Frozen, Lora, Step};
use model::{Adapter, Model, ModelConfig};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use random_model::{Row, Run, Sizes, norm, off, runs, sizes};

const CASES: usize = 24;
/// Segments are longer than the tiles of the attention kernels.
const LONGEST: usize = 150;
const SCALE: f32 = 0.5;

/// Sizes that a GPU takes: rows are read 16 bytes at a time, and so is each half of a head. Heads of
/// 64, 128 and 256 have the fast attention in 16 bits.
fn sizes_on_a_gpu() -> impl Strategy<Value = Sizes> {
    let head_dim = prop::sample::select(vec![16, 48, 64, 64, 128, 256]);
    (sizes(), head_dim, 1usize..=2).prop_map(|(sizes, head_dim, power)| Sizes {
        // Not below 64: norms of a few values lose what 2e-2 in bf16 leaves.
        hidden: 56 + sizes.hidden.next_multiple_of(8),
        ffn: 56 + sizes.ffn.next_multiple_of(8),
        vocabulary: sizes.vocabulary.next_multiple_of(8),
        head_dim,
        // Inside a tile, and across tiles.
        window: sizes.window.pow(power as u32),
        ..sizes
    })
}

/// A GPU has no DoRA, and this compares no dropout. One segment more, so that no row is too short to
/// average rounding.
fn runs_on_a_gpu() -> impl Strategy<Value = Run> {
    runs(LONGEST).prop_map(|mut run| {
        run.segments.push(64);
        Run { variant: 0, ..run }
    })
}

/// As `run`, but every projection is adapted, by factors that weigh no more than the weights: where
/// attention alone is, or its scores are large, gradients cancel to less than bf16 keeps. An
/// emulation of its rounding over 48 such cases is at most 1.5e-2 off.
fn in_bf16(run: &Run) -> Run {
    let alpha = run.alpha.min(run.r as f32);
    Run { targets: 127, rslora: false, alpha, ..run.clone() }
}

fn to_bf16(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// Sum of losses and gradient, the same bits however activations and weights are kept.
fn on_a_gpu(
    device: &Device,
    folder: &Path,
    (config, adapter): (&ModelConfig, &Adapter),
    row: &Row,
) -> (f64, Vec<f32>) {
    let frozen = Frozen::load(device, folder).unwrap();
    let lora = Lora::new(device, config, adapter).unwrap();
    let modes = [
        (Activations::Keep, false),
        (Activations::Keep, true),
        (Activations::Recompute, false),
        (Activations::Offload, false),
    ];
    let results = modes.map(|(activations, keeps_weights)| {
        let mut step = Step::new(device, &frozen, &lora, row.tokens.len(), activations).unwrap();
        if keeps_weights {
            assert!(step.keep_weights(device, &frozen, &lora).unwrap());
        }
        lora.zero_grad(device).unwrap();
        step.run(device, &frozen, &lora, row.batch(), SCALE).unwrap();
        (step.take_loss(device).unwrap(), lora.read_gradient(device).unwrap())
    });
    let bits = |gradient: &[f32]| gradient.iter().map(|g| g.to_bits()).collect::<Vec<u32>>();
    for (mode, (loss, gradient)) in modes.iter().zip(&results) {
        assert_eq!(loss.to_bits(), results[0].0.to_bits(), "{mode:?}");
        assert_eq!(bits(gradient), bits(&results[0].1), "{mode:?}");
    }
    let [kept, ..] = results;
    kept
}

/// Compares with the CPU in f32, on weights and factors that both types hold exactly; says whether
/// that is within the limits, and nothing where there is no GPU.
fn check(dtype: Dtype, sizes: &Sizes, run: &Run) -> Option<bool> {
    // A device compiles the kernels of one width of heads.
    let device = Device::open(0, dtype).map_err(fixtures::skipped).ok()?;
    let dir = tempfile::tempdir().unwrap();
    random_model::write_model(dir.path(), sizes, run.seed, to_bf16);
    let model = Model::load(dir.path()).unwrap();
    let adapter = random_model::adapter(&model, run, to_bf16);
    let row = Row::new(sizes, run);
    let mut wanted = vec![0.0; adapter.values.len()];
    let loss = model.loss_and_grad(&adapter, row.batch(), SCALE, None, &mut wanted).unwrap().sum;
    let (found_loss, found) = on_a_gpu(&device, dir.path(), (model.config(), &adapter), &row);
    let all = norm(wanted.iter().copied());
    assert!(all > 0.0);
    let of_all = norm(found.iter().zip(&wanted).map(|(a, b)| a - b)) / all;
    let (mut worst, mut fits) = ((0.0, String::new()), true);
    for factor in &adapter.factors {
        for (range, part) in [(&factor.a, "A"), (&factor.b, "B")] {
            let (off, limit) = off(&found[range.clone()], &wanted[range.clone()], 1e-4, all);
            fits &= off < limit;
            let relative = off / limit * 1e-4;
            if relative > worst.0 || relative.is_nan() {
                worst = (relative, format!("{part} of {}", factor.name));
            }
        }
    }
    let loss_off = (found_loss - loss).abs() / loss;
    eprintln!(
        "{dtype:?} {sizes:?} {run:?}: loss {loss_off:.1e}, all factors {of_all:.1e}, worst {:.1e} ({})",
        worst.0, worst.1
    );
    Some(match dtype {
        Dtype::F32 => fits && loss_off < 1e-5,
        _ => of_all < 2e-2 && loss_off < 5e-3,
    })
}

#[test]
fn gradients_on_random_shapes_are_those_of_the_cpu() {
    let mut runner = TestRunner::deterministic();
    let mut beyond = Vec::new();
    for _ in 0..CASES {
        let case = (sizes_on_a_gpu(), runs_on_a_gpu()).new_tree(&mut runner).unwrap();
        let (sizes, run) = case.current();
        for (dtype, run) in [(Dtype::F32, &run), (Dtype::Bf16, &in_bf16(&run))] {
            let Some(within) = check(dtype, &sizes, run) else { return };
            if !within {
                beyond.push(format!("{dtype:?} {sizes:?} {run:?}"));
            }
        }
    }
    assert!(beyond.is_empty(), "beyond the limits: {beyond:#?}");
}
