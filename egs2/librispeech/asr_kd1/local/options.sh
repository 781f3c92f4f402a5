# What is decoded: the parts that were named for it, else the test speakers of a split; --test_sets says otherwise.
# Sourced by asr_kd.sh.
# shellcheck shell=bash disable=SC2154,SC2034
if [ -z "${given[test_sets]+x}" ]; then
    test_sets=${given[split_by_speaker]:+test}
    test_sets=${given[test_parts]-${test_sets:-test-clean test-other}}
    test_sets=${test_sets//-/_}
fi
