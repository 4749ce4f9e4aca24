import pytest

from animeface_pipeline.schedulers import SCHEDULERS, original_scheduler, switch_scheduler


def test_the_originals_schedule_visits_every_timestep() -> None:
    scheduler = original_scheduler()
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    assert scheduler.config.clip_sample is False and scheduler.config.variance_type == "fixed_large"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [5, 7, 10, 1000])
def test_every_solver_begins_at_the_noise_before_and_after_a_reload(name: str, steps: int, tmp_path) -> None:
    scheduler = switch_scheduler(original_scheduler(), name, steps)
    scheduler.save_pretrained(tmp_path)
    reloaded = type(scheduler).from_pretrained(tmp_path)
    again = switch_scheduler(reloaded, name, steps)
    timesteps = []
    for one in (scheduler, reloaded, again):
        one.set_timesteps(steps)
        timesteps.append(one.timesteps.tolist())
    assert timesteps[0] == timesteps[1] == timesteps[2]
    assert timesteps[0][0] == 999 and len(set(timesteps[0])) == steps


def test_ddpm_gets_the_variance_that_is_right_for_its_steps() -> None:
    scheduler = original_scheduler()
    assert switch_scheduler(scheduler, "ddpm", 50).config.variance_type == "fixed_small"
    assert switch_scheduler(scheduler, "ddpm", 1000).config.variance_type == "fixed_large"


def test_what_the_network_predicts_is_carried_over() -> None:
    scheduler = original_scheduler(prediction_type="v_prediction")
    for name in SCHEDULERS:
        assert switch_scheduler(scheduler, name, 10).config.prediction_type == "v_prediction"


def test_a_solver_is_the_same_whichever_one_it_takes_the_place_of() -> None:
    for former in SCHEDULERS:
        for name in SCHEDULERS:
            expected = switch_scheduler(original_scheduler(), name)
            found = switch_scheduler(switch_scheduler(original_scheduler(), former), name)
            assert type(found) is type(expected)
            for key in expected.config.keys() - {"_use_default_values"}:
                assert found.config[key] == expected.config[key], (former, name, key)


def test_an_unknown_name_is_answered_with_the_table() -> None:
    with pytest.raises(ValueError, match=r"scheduler 'dpm\+\+': must be one of ddpm, ddim"):
        switch_scheduler(original_scheduler(), "dpm++")
