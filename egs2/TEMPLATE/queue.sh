# A queue of runs of run.sh. Each starts when what it needs has ended well and a place is free; its output goes into a
# log of its own, and the console gets a line for each that ends and one line of progress. Sourced by run_all.sh, which
# sets run (a recipe's run.sh), options (of every run) and logs (a directory).
# shellcheck shell=bash disable=SC2154,SC2034

queue=() # names, in the order in which they start if they can
# By name: what it needs, a name a line, "NAME?" if it need only be over; options; where it trains; epochs (0: unknown);
# waiting, running, done, failed or lost (what it needs failed); process; when it began.
declare -A needs=() arguments=() trains_in=() epochs=() state=() pid_of=() began=()
declare -A pids=() # of process groups that run
finished=0
stop_at_failure=false # true: the first run that fails ends the script, with that run's exit code

log() {
    [ ! -t 2 ] || printf '\r\033[K' >&2 # the line of progress
    echo "$(date '+%H:%M:%S') $*" >&2
}
log_of() {
    local name=${1//, /_}
    echo "${logs}/${name// /_}.log"
}
# tail_of FILE: its last lines; a bar of progress is many
tail_of() { tail -n 5 "$1" | tr '\r' '\n' | tail -n 5 >&2; }
spell() { if [ "$1" -lt 100 ]; then echo "$1 s"; else echo "$((($1 + 30) / 60)) min"; fi; }

# start COMMAND …: in the background, in a process group of its own, so that all of it ends when the script does
start() {
    set -m
    "$@" &
    set +m
    pids[$!]=1
}
end_runs() {
    local pid
    [ ! -t 2 ] || printf '\r\033[K' >&2
    for pid in "${!pids[@]}"; do kill -- "-${pid}" 2>/dev/null || true; done # some have ended by now
    wait
}

# enqueue NAME NEEDS DIR EPOCHS OPTION…
enqueue() {
    local words
    printf -v words '%q ' "${@:5}"
    queue+=("$1")
    needs["$1"]=$2 trains_in["$1"]=$3 epochs["$1"]=${4:-0} arguments["$1"]=${words} state["$1"]=waiting
}

# ready NAME: 0 if it can start, 1 if not yet, 2 if never
ready() {
    local need
    while IFS= read -r need; do
        [ -n "${need}" ] || continue
        case "${need}:${state["${need%\?}"]}" in
        *:done | *\?:failed | *\?:lost) ;;
        *:failed | *:lost) return 2 ;;
        *) return 1 ;;
        esac
    done <<<"${needs["$1"]}"
}

# run_queue LIMIT: all of it, so many side by side
run_queue() {
    local name rc running=0 changed
    queue_began=${SECONDS} epochs_before=0
    epochs_before=$(count_epochs)
    while :; do
        changed=''
        for name in "${queue[@]}"; do
            if [ "${state["${name}"]}" = running ] && ! kill -0 "${pid_of["${name}"]}" 2>/dev/null; then
                rc=0
                wait "${pid_of["${name}"]}" || rc=$?
                unset "pids[${pid_of["${name}"]}]"
                running=$((running - 1)) changed=1
                end_of_run "${name}" "${rc}"
            fi
        done
        for name in "${queue[@]}"; do
            [ "${state["${name}"]}" = waiting ] || continue
            rc=0
            ready "${name}" || rc=$?
            if [ "${rc}" = 2 ]; then
                state["${name}"]=lost changed=1
            elif [ "${rc}" = 0 ] && [ "${running}" -lt "$1" ]; then
                launch "${name}"
                running=$((running + 1)) changed=1
            fi
        done
        [ -z "${changed}" ] || continue # what has ended makes others start
        [ "${running}" -gt 0 ] || break
        show_progress
        sleep 0.5
    done
}

launch() {
    local -a words="(${arguments["$1"]})"
    start "${run}" "${options[@]}" "${words[@]}" >"$(log_of "$1")" 2>&1 </dev/null
    state["$1"]=running pid_of["$1"]=$! began["$1"]=${SECONDS}
}

# end_of_run NAME CODE
end_of_run() {
    finished=$((finished + 1))
    if [ "$2" = 0 ]; then
        state["$1"]='done'
        log "${finished} of ${#queue[@]}: $1, $(spell $((SECONDS - ${began["$1"]})))"
    else
        state["$1"]=failed
        log "${finished} of ${#queue[@]}: $1 FAILED; the end of $(log_of "$1"):"
        tail_of "$(log_of "$1")"
        if [ "${stop_at_failure}" = true ]; then
            echo "error: failed: $1; the whole log is $(log_of "$1")" >&2
            exit "$2"
        fi
    fi
}

# step NAME OPTION…: one run alone, before the queue or after it; its exit code
step() {
    local rc=0 since=${SECONDS} pid
    start "${run}" "${options[@]}" "${@:2}" >"$(log_of "$1")" 2>&1 </dev/null
    pid=$!
    while kill -0 "${pid}" 2>/dev/null; do
        ! is_time || show "running: $1, $(spell $((SECONDS - since)))"
        sleep 0.5
    done
    wait "${pid}" || rc=$?
    unset "pids[${pid}]"
    if [ "${rc}" = 0 ]; then
        log "$1, $(spell $((SECONDS - since)))"
    else
        log "$1 FAILED; the end of $(log_of "$1"):"
        tail_of "$(log_of "$1")"
    fi
    return "${rc}"
}

# epochs_of NAME: how many it has finished
epochs_of() {
    local done_epochs=${epochs["$1"]}
    if [ "${state["$1"]}" != 'done' ]; then
        done_epochs=$(cat "${trains_in["$1"]:-/dev/null}"/train*.log 2>/dev/null | grep -c 'epoch results' || true) # none yet: 0
    fi
    echo $((done_epochs < ${epochs["$1"]} ? done_epochs : ${epochs["$1"]}))
}
count_epochs() {
    local name sum=0
    for name in "${queue[@]}"; do
        [ "${epochs["${name}"]}" = 0 ] || [ "${state["${name}"]}" = lost ] || sum=$((sum + $(epochs_of "${name}")))
    done
    echo "${sum}"
}

# is_time: whether progress is to be shown again
shown=${SECONDS}
is_time() {
    local every=60
    [ ! -t 2 ] || every=2
    [ $((SECONDS - shown)) -ge "${every}" ] || return 1
    shown=${SECONDS}
}
# show TEXT: on a terminal one line that is written over, elsewhere a further one
show() {
    local columns
    if [ -t 2 ]; then
        columns=$(stty size <&2 2>/dev/null || true) # a terminal without size: see below
        columns=${columns#* }
        [ "${columns:-0}" -gt 1 ] || columns=80 # a terminal that does not know its width
        printf '\r\033[K%s' "${1:0:$((columns - 1))}" >&2
    else
        log "$1"
    fi
}
# show_progress: of the queue, with the time that its trainings will take at the pace so far
show_progress() {
    local name text all=0 known running=()
    is_time || return 0
    for name in "${queue[@]}"; do
        [ "${state["${name}"]}" = lost ] || all=$((all + ${epochs["${name}"]}))
        [ "${state["${name}"]}" = running ] || continue
        text="${name}, $(spell $((SECONDS - ${began["${name}"]})))"
        [ "${epochs["${name}"]}" = 0 ] || text="${name}, epoch $(epochs_of "${name}") of ${epochs["${name}"]}"
        running+=("${text}")
    done
    text="${finished} of ${#queue[@]} done"
    known=$(count_epochs)
    if [ "${known}" -gt "${epochs_before}" ] && [ "${known}" -lt "${all}" ]; then
        text+=", about $(spell $(((all - known) * (SECONDS - queue_began) / (known - epochs_before)))) of training left"
    fi
    text+="; running: $(printf '%s; ' "${running[@]}")"
    show "${text%; }"
}
