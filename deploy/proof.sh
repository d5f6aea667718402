#!/usr/bin/env bash
# The proof of a running installation: what is installed, what systemd says, what the doctor sees, whether every recorded
# decision follows from its recorded inputs, and the last of the log. Changes nothing; prints no secret.
#
# Usage: proof.sh
#   GOVERNOR    the command to ask, /usr/local/bin/governor by default
#   EVENTS_MOST how many events may be audited whole, 500000 by default; a longer history is audited by hand
#
# Exit codes: 0 all well; 1 a check failed; 3 a decision differs or the chain is broken; 4 Redis not reachable;
# 78 bad settings.
set -euo pipefail
umask 077

readonly governor=${GOVERNOR:-/usr/local/bin/governor}
readonly home=/opt/quantum/governor
readonly unit=quantum-governor.service
readonly most=${EVENTS_MOST:-500000}

part() {
    printf '\n== %s\n' "$1"
}

# Name and value of a fact; what cannot be told is told as such.
fact() {
    local name=$1 told
    shift
    told=$("$@" 2>/dev/null) || true
    printf '%-12s %s\n' "$name" "${told:-unknown}"
}

has_systemd() {
    [[ -d /run/systemd/system ]] && command -v systemctl >/dev/null
}

units() {
    if ! has_systemd; then
        echo 'no systemd here'
        return
    fi
    local apply one
    apply=$(apply_service)
    for one in "$unit" quantum-governor-disarm.socket quantum-governor-deadman.service "$apply"; do
        printf '%s: ' "$one"
        systemctl show "$one" -p LoadState,ActiveState,SubState,UnitFileState,ActiveEnterTimestamp,NRestarts,MainPID,User |
            paste -sd ' ' || echo 'not told'
    done
}

apply_service() {
    local told
    told=$("$governor" settings 2>/dev/null | sed -n 's/^APPLY_SERVICE=//p') || true
    printf '%s' "${told:-quantum-apply-layer.service}"
}

release() {
    readlink "$home/current"
}

version() {
    "$governor" --version
}

systemd_version() {
    systemctl --version | head -n 1
}

redis_version() {
    redis-server --version || valkey-server --version
}

number_of_events() {
    "$governor" status --json 2>/dev/null | sed -n 's/.*"seq":\([0-9]*\),"hash".*/\1/p'
}

audit() {
    local count
    count=$(number_of_events) || true
    if [[ -n $count ]] && ((count > most)); then
        echo "$count events are more than EVENTS_MOST=$most: run governor replay by hand"
        return 0
    fi
    "$governor" replay
}

log() {
    if command -v journalctl >/dev/null && has_systemd; then
        journalctl -u "$unit" -n 20 --no-pager -o short-iso || echo 'not told'
    else
        echo 'no journal here'
    fi
}

main() {
    local worst=0 code=0
    if ! command -v "$governor" >/dev/null; then
        printf 'proof.sh: %s is no command; is Governor installed? Set GOVERNOR to the command to ask.\n' "$governor" >&2
        return 1
    fi
    part 'what is installed'
    fact date date -u +%Y-%m-%dT%H:%M:%SZ
    fact host uname -nsr
    fact release release
    fact version version
    fact systemd systemd_version
    fact redis redis_version
    part 'units'
    units
    part 'checks'
    "$governor" doctor || worst=$?
    part 'state'
    "$governor" status || code=$?
    # DISARMED (3) is a state like another; what is wrong with it the checks say.
    if ((code != 0 && code != 3 && worst == 0)); then worst=$code; fi
    part 'audit'
    code=0
    audit || code=$?
    if ((worst == 0)); then worst=$code; fi
    part "the last of the log"
    log
    part 'result'
    if ((worst == 0)); then
        echo 'all well'
    else
        printf 'NOT WELL (exit code %s): see what failed above\n' "$worst"
    fi
    return "$worst"
}

main
