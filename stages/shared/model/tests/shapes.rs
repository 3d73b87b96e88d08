//! The hand-written backward pass against Burn's autodiff on random shapes of every family.
#![allow(clippy::unwrap_used, reason = "tests")]

mod random_model;

use model::{DropoutKey, Model, reference};
use proptest::prelude::*;
use random_model::{Row, norm, off, runs, sizes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn gradients_and_losses_are_those_of_autodiff(sizes in sizes(), run in runs(20)) {
        let dir = tempfile::tempdir().unwrap();
        random_model::write_model(dir.path(), &sizes, run.seed, |v| v);
        let model = Model::load(dir.path()).unwrap();
        let adapter = random_model::adapter(&model, &run, |v| v);
        let row = Row::new(&sizes, &run);
        let key = (run.variant == 1).then_some(DropoutKey { seed: run.seed, micro_step: 7 });
        let mut grad = vec![0.0; adapter.values.len()];
        let loss = model.loss_and_grad(&adapter, row.batch(), 0.5, key, &mut grad).unwrap();
        let (twin_loss, twin) =
            reference::loss_and_grad_with_dropout(&model, &adapter, row.batch(), 0.5, key);
        prop_assert_eq!(loss.targets, twin_loss.targets);
        prop_assert!((loss.sum - twin_loss.sum).abs() < 1e-5 * twin_loss.sum, "{loss:?} {twin_loss:?}");
        let all = norm(twin.iter().copied());
        prop_assert!(all > 0.0);
        for range in adapter.tensors() {
            let (off, limit) = off(&grad[range.clone()], &twin[range.clone()], 1e-4, all);
            prop_assert!(off < limit, "{range:?}: {off} of {limit}");
        }
    }
}
