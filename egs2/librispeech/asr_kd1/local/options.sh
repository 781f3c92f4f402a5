# Sets to decode, unless --test_sets is given: those of --test_parts, or the test speakers of --split_by_speaker.
# Sourced by asr_kd.sh.
# shellcheck shell=bash disable=SC2154,SC2034
if [ -z "${given[test_sets]+x}" ]; then
    test_sets=${given[split_by_speaker]:+test}
    test_sets=${given[test_parts]-${test_sets:-test-clean test-other}}
    test_sets=${test_sets//-/_}
fi
