#!/bin/bash
# Installs, updates, rolls back and removes Governor on a host with systemd. Running it again is always safe: what is
# as it should be is left alone, and nothing is restarted that did not change. See docs/installing.md.
set -euo pipefail
shopt -s inherit_errexit
umask 077
export LC_ALL=C

readonly BASE=/opt/quantum/governor
readonly RELEASES=$BASE/releases
readonly CURRENT=$BASE/current
readonly COMMAND=/usr/local/bin/governor
readonly SHARE=/usr/local/share
readonly MAN_PAGE=$SHARE/man/man1/governor.1
readonly COMPLETION=$SHARE/bash-completion/completions/governor
readonly ETC=/etc/quantum
readonly SETTINGS=$ETC/governor.env
readonly CREDENTIALS=$ETC/governor.credentials
readonly DASHBOARD_SETTINGS=$ETC/dashboard.env
readonly DASHBOARD_CREDENTIALS=$ETC/dashboard.credentials
readonly UNITS=/etc/systemd/system
readonly STATE=/var/lib/quantum-governor
readonly HELPER_STATE=/var/lib/quantum-governor-disarm
readonly ACCOUNT=quantum-governor
readonly SHARED_GROUP=quantum
readonly SERVICE=quantum-governor.service
readonly SOCKET=quantum-governor-disarm.socket
readonly DASHBOARD=quantum-governor-dashboard.service
readonly OUR_UNITS=(quantum-governor.service quantum-governor-disarm.socket quantum-governor-disarm@.service
    quantum-governor-deadman.service quantum-governor-dashboard.service)
readonly SOURCES=(governor events projections deploy pyproject.toml README.md LICENSE)
readonly KEPT_RELEASES=4
readonly READY_WITHIN_S=90

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
action=install dry_run=no start=yes proof=yes keep_data=no sure=no
wheelhouse='' profile='' python='' release='' config_path='' apply_service='' journal_dir='' archive_dir='' work=''
changes=0

usage() {
    cat <<'EOF'
Usage: deploy/install.sh [options]

Installs this checkout as a release under /opt/quantum/governor and starts it. Run as root.

  --dry-run         say what would be done, change nothing
  --no-start        install and enable, start and restart nothing
  --no-proof        do not run deploy/proof.sh at the end
  --profile NAME    limits for a first installation: conservative (default), moderate, aggressive
  --wheelhouse DIR  take the Python packages from DIR instead of the network
  --python PATH     the Python to run on, 3.11 or later
  --rollback        go back to the release before; run it again to return
  --uninstall       remove everything; asks first
  --keep-data       with --uninstall: keep settings, credentials, journal and archive
  --yes             with --uninstall: do not ask

Exit codes: 0 done, 1 failed, 2 usage, 3 installed and running but the proof found something.
EOF
}

say() { printf '%s\n' "$*"; }
note() { printf 'note: %s\n' "$*"; }
die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
wrong() {
    printf 'install.sh: %s (see --help)\n' "$*" >&2
    exit 2
}

# change WHAT COMMAND…: the one way in which anything is changed.
change() {
    changes=$((changes + 1))
    if [[ $dry_run == yes ]]; then
        say "would: $1"
    else
        say "$1"
        "${@:2}"
    fi
}

# put WHAT MODE OWNER GROUP PATH: standard input becomes the file, at once and never more readable than MODE.
put() {
    local what=$1 mode=$2 owner=$3 group=$4 path=$5
    cat >"$work/new"
    if [[ -f $path && ! -L $path ]] && cmp -s "$work/new" "$path" &&
        [[ $(stat -c '%a %U %G' "$path") == "$mode $owner $group" ]]; then
        return 0
    fi
    change "$what: $path" put_now "$mode" "$owner" "$group" "$path"
}
put_now() {
    local next
    next=$(mktemp "$(dirname "$4")/.$(basename "$4").XXXXXX")
    cat "$work/new" >"$next"
    chown "$2:$3" "$next"
    chmod "$1" "$next"
    sync "$next"
    mv -fT "$next" "$4"
}

# directory MODE OWNER GROUP PATH
directory() {
    if [[ ! -d $4 ]]; then
        change "directory $4" install -d -m "$1" -o "$2" -g "$3" "$4"
    fi
}

# point NAME TARGET: a symbolic link, replaced in one step.
point() {
    ln -sfn "$2" "$BASE/.$1.new"
    mv -fT "$BASE/.$1.new" "$BASE/$1"
}

linked() { readlink "$BASE/$1" 2>/dev/null || true; }

# A program of a release: deploying RELEASE_DIRECTORY COMMAND…
deploying() { "$1/venv/bin/python" -I -m governor.deploying "${@:2}"; }

systemd_runs() { [[ -d /run/systemd/system ]]; }
active() { systemctl is-active --quiet "$1"; }
known() { [[ $(systemctl show --property=LoadState --value "$1" 2>/dev/null) == loaded ]]; }

# -- what is needed ---------------------------------------------------------------------------------------------------

require_host() {
    [[ $EUID -eq 0 ]] || die "has to run as root, try: sudo $0"
    local tool
    for tool in systemctl systemd-analyze systemd-sysusers runuser flock sha256sum tar; do
        command -v "$tool" >/dev/null || die "$tool is not there; expected a host with systemd, such as Debian 12 or Ubuntu 22.04"
    done
    if [[ $start == yes ]] && ! systemd_runs; then
        die "systemd is not running here; --no-start installs without it"
    fi
    # A lock on a directory that is there anyway leaves nothing behind, not even in a dry run.
    exec 9<"$UNITS"
    flock -n 9 || die "another one is running"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
}

find_python() {
    local candidate found
    local -a candidates=(/usr/bin/python3 /usr/bin/python3.{14,13,12,11} /usr/local/bin/python3{,.14,.13,.12,.11})
    if [[ -n $python ]]; then
        candidates=("$python")
    fi
    for candidate in "${candidates[@]}"; do
        # Its real name: python3 becomes another one with the distribution's next version, and the release would break.
        found=$("$candidate" -I -c 'import sys, os; sys.version_info >= (3, 11) or sys.exit(1)
import ensurepip, ssl, venv
print(os.path.realpath(sys._base_executable))' 2>/dev/null) || continue
        [[ $found == /* ]] || continue
        case $found in
            /home/* | /root/* | /run/* | /tmp/*) [[ -z $python ]] || die "--python $python is $found, where the service may not look; expected one outside of /home, /root, /run and /tmp" ;;
            *)
                python=$found
                return 0
                ;;
        esac
    done
    [[ -z $python ]] || die "--python $python: expected Python 3.11 or later with venv and ensurepip"
    die "no Python 3.11 or later with venv and ensurepip; try: apt-get install python3-venv (Ubuntu 22.04: python3.11-venv)"
}

# -- the release ------------------------------------------------------------------------------------------------------

# fingerprint DIRECTORY: what is installed from a source tree, on which Python, with which packages.
fingerprint() {
    (
        cd "$1"
        find "${SOURCES[@]}" -type f ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
        find "${SOURCES[@]}" -type f ! -path '*/__pycache__/*' -perm -u=x | sort
        "$python" -I -c 'import sys; print(sys.version, sys.platform)'
        echo "$python"
        if [[ -n $wheelhouse ]]; then
            cd "$wheelhouse"
            find . -maxdepth 1 -name '*.whl' -print0 | sort -z | xargs -0 sha256sum
        fi
    ) | sha256sum | cut -c 1-12
}

choose_release() {
    local version
    [[ -f $here/pyproject.toml && -f $here/governor/settings.py ]] ||
        die "$here holds no checkout of Governor; expected deploy/install.sh of one (from here only --rollback and --uninstall)"
    version=$(sed -n 's/^version = "\([0-9A-Za-z.+]*\)"$/\1/p' "$here/pyproject.toml" | head -n 1)
    [[ -n $version ]] || die "$here/pyproject.toml names no version"
    release=$version-$(fingerprint "$here")
}

prepare_release() {
    if [[ ! -d $RELEASES/$release ]]; then
        change "release $release, on $python" build_release
    fi
}

build_release() {
    local part=$RELEASES/.building
    # What a run that was killed left behind; the lock says that no other one is at work.
    rm -rf "$RELEASES"/.building*
    (
        umask 022
        mkdir -p "$part/src" "$part/release"
        tar -C "$here" -cf - --exclude=__pycache__ "${SOURCES[@]}" | tar -C "$part/src" -xf - --no-same-owner --no-same-permissions
        [[ $release == *-$(fingerprint "$part/src") ]] || die "$here changed meanwhile; run it again"

        local venv=$part/release/venv
        "$python" -I -m venv "$venv"
        local -a where=() pip=("$venv/bin/python" -I -m pip --quiet --no-input --disable-pip-version-check)
        local -a install=("${pip[@]}" install --no-warn-script-location --only-binary :all:)
        if [[ -n $wheelhouse ]]; then
            where=(--isolated --no-index --find-links "$wheelhouse")
            # No version is asked for: the wheelhouse decides, within the ranges of pyproject.toml.
            "${install[@]}" "${where[@]}" --target "$part/backend" hatchling ||
                die "the packages are not all in $wheelhouse: hatchling"
        else
            "${install[@]}" --target "$part/backend" --require-hashes -r "$part/src/deploy/requirements-build.txt" ||
                die "the packages that build it could not be had; without network: --wheelhouse"
            "${install[@]}" --require-hashes -r "$part/src/deploy/requirements.txt" ||
                die "the packages could not be had; without network: --wheelhouse"
            where=(--no-deps --no-index)
        fi
        PYTHONPATH=$part/backend "${pip[@]}" wheel --no-build-isolation --no-deps --no-index --wheel-dir "$part/dist" "$part/src"
        local -a wheel=("$part"/dist/quantum_governor-*.whl)
        "${install[@]}" "${where[@]}" "${wheel[0]}[dashboard]" || die "the packages are not all in $wheelhouse"
        "${pip[@]}" check
        "$venv/bin/python" -I -m pip list --disable-pip-version-check --format=freeze >"$part/release/installed.txt"
        # A release is not changed any more: what could change it goes.
        "${pip[@]}" uninstall --quiet --yes setuptools pip
        # Scripts carry the path the venv was built at. Nothing needs them: everything is started with the interpreter.
        find "$venv/bin" ! -type d ! -name 'python*' -delete

        cp -r "$part/src/deploy" "$part/release/deploy"
        install -D -m 755 "$part/src/deploy/libexec/quantum-governor-disarm" "$part/release/libexec/quantum-governor-disarm"
        chmod -R u=rwX,go=rX "$part/release"
        sync -f "$part"
        mv -T "$part/release" "$RELEASES/$release"
    )
    rm -rf "$part"
}

switch_release() {
    if [[ $(linked current) != releases/$release ]]; then
        change "active release: $release" switch_to "$release"
    fi
}
switch_to() {
    local before
    before=$(linked current)
    if [[ -n $before ]]; then
        point previous "$before"
    fi
    point current "releases/$1"
}

prune_releases() {
    local old number=0
    while IFS= read -r old; do
        case releases/$old in
            "$(linked current)" | "$(linked previous)") continue ;;
        esac
        number=$((number + 1))
        if ((number > KEPT_RELEASES - 2)); then
            change "old release $old removed" rm -rf "${RELEASES:?}/$old"
        fi
    done < <(find "$RELEASES" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %f\n' 2>/dev/null | sort -rn | cut -d ' ' -f 2-)
}

# -- settings and secrets ---------------------------------------------------------------------------------------------

prepare_account() {
    if ! id -u "$ACCOUNT" >/dev/null 2>&1 || ! id -nG "$ACCOUNT" | grep -qw "$SHARED_GROUP"; then
        change "user $ACCOUNT, in group $SHARED_GROUP" systemd-sysusers "$here/deploy/sysusers.d/quantum-governor.conf"
    fi
}

prepare_directories() {
    directory 755 root root /opt/quantum
    directory 755 root root "$BASE"
    directory 755 root root "$RELEASES"
    directory 750 root "$SHARED_GROUP" "$ETC"
    directory 700 root root "$CREDENTIALS"
    local file
    for file in "$CREDENTIALS" "$DASHBOARD_CREDENTIALS"; do
        if [[ -d $file && $(stat -c '%a %u' "$file") != '700 0' ]]; then
            change "$file only for root" tighten 700 "$file"
        fi
    done
    for file in "$CREDENTIALS"/* "$DASHBOARD_CREDENTIALS"/*; do
        if [[ -f $file && $(stat -c '%a %u' "$file") != '600 0' ]]; then
            change "$file only for root" tighten 600 "$file"
        fi
    done
}
tighten() {
    chown root:root "$2"
    chmod "$1" "$2"
}

# The template with the values of a profile in it.
first_settings() {
    local line
    cp "$here/deploy/governor.env" "$work/first"
    while IFS= read -r line; do
        if [[ $line =~ ^([A-Z0-9_]+)= ]]; then
            grep -q "^${BASH_REMATCH[1]}=" "$work/first" || die "deploy/governor.env has no ${BASH_REMATCH[1]}"
            sed -i "s|^${BASH_REMATCH[1]}=.*|$line|" "$work/first"
        fi
    done <"$here/deploy/profiles/${profile:-conservative}.env"
    cat "$work/first"
}

prepare_settings() {
    local what=settings mode=640 owner=root group=$SHARED_GROUP
    if [[ -e $SETTINGS ]]; then
        [[ -f $SETTINGS && ! -L $SETTINGS ]] || die "$SETTINGS is no plain file"
        [[ -z $profile ]] || note "$SETTINGS keeps its limits: --profile is for a first installation"
        cp "$SETTINGS" "$work/settings"
        what='settings this release knows, as comments'
        # Tighter ones stay: systemd reads the file as root.
        mode=$(stat -c %a "$SETTINGS") && owner=$(stat -c %U "$SETTINGS") && group=$(stat -c %G "$SETTINGS")
        if (((8#$mode & 8#7137) != 0)) || [[ $owner != root || ($mode == 640 && $group != "$SHARED_GROUP") ]]; then
            what='settings, closed to others' mode=640 owner=root group=$SHARED_GROUP
        fi
    else
        first_settings >"$work/settings"
    fi
    if [[ -d $RELEASES/$release ]]; then
        deploying "$RELEASES/$release" comments "$work/settings" >"$work/comments" || die "$SETTINGS: see above"
        if [[ -s $work/comments && -n $(tail -c 1 "$work/settings") ]]; then
            echo >>"$work/settings"
        fi
        cat "$work/comments" >>"$work/settings"
    else
        note "settings $SETTINGS does not mention are added as comments once the release is there"
    fi
    put "$what" "$mode" "$owner" "$group" "$SETTINGS" <"$work/settings"
}

prepare_credentials() {
    local name rest source=$ETC/testnet.env
    [[ -d $RELEASES/$release ]] || return 0
    if [[ -f $source ]]; then
        deploying "$RELEASES/$release" credentials --dry-run "$source" "$CREDENTIALS" >"$work/credentials" || die "$source: see above"
        while read -r name rest; do
            case $rest in
                copied) change "$name of $source into $CREDENTIALS" true ;;
                'not there') note "$source has no $name" ;;
                kept,*) note "$CREDENTIALS/$name is $rest ($source)" ;;
            esac
        done <"$work/credentials"
        if [[ $dry_run == no ]] && grep -q ' copied$' "$work/credentials"; then
            deploying "$RELEASES/$release" credentials "$source" "$CREDENTIALS" >/dev/null
        fi
    fi
    deploying "$RELEASES/$release" secrets "$work/settings" >"$work/names"
    while read -r name; do
        note "$SETTINGS holds $name; its place is $CREDENTIALS/$name, where only root reads it"
    done <"$work/names"
    if [[ $dry_run == no && ! -s $CREDENTIALS/BINANCE_TESTNET_API_KEY ]] && ! grep -q '^[[:blank:]]*BINANCE_TESTNET_API_KEY' "$work/settings"; then
        note "no exchange credentials in $CREDENTIALS: quantity limits decide"
    fi
}

# Lines of the drop-in that gives the service its secrets: those that are there, for a missing one keeps it from starting.
credential_lines() {
    local name
    deploying "$RELEASES/$release" secrets >"$work/names"
    while read -r name; do
        if [[ -f $CREDENTIALS/$name ]]; then
            say "LoadCredential=$name:$CREDENTIALS/$name"
        fi
    done <"$work/names"
}

# The same for the dashboard: its own before the governor's, and none of the exchange's. With a token people act there.
dashboard_lines() {
    local name from
    for name in REDIS_PASSWORD GOV_AUDIT_KEY; do
        for from in "$DASHBOARD_CREDENTIALS" "$CREDENTIALS"; do
            if [[ -f $from/$name ]]; then
                say "LoadCredential=$name:$from/$name"
                break
            fi
        done
    done
    if [[ -f $DASHBOARD_CREDENTIALS/DASHBOARD_TOKEN ]]; then
        say "LoadCredential=DASHBOARD_TOKEN:$DASHBOARD_CREDENTIALS/DASHBOARD_TOKEN"
        say 'Environment=DASHBOARD_TOKEN_FILE=%d/DASHBOARD_TOKEN'
    fi
}

# Would it start? Asked of the new release before anything is switched to it.
check_settings() {
    local -a options=()
    [[ $start == yes ]] || options=(--offline)
    [[ -d $RELEASES/$release && $dry_run == no ]] || return 0
    # Only what systemd will give it: nothing of this shell's environment.
    env -i PATH="$PATH" CREDENTIALS_DIRECTORY="$CREDENTIALS" STATE_DIRECTORY="$STATE" \
        "$RELEASES/$release/venv/bin/python" -I -m governor.deploying check "${options[@]}" "$SETTINGS" ||
        die "the settings do not let it start; nothing was switched or restarted. Mend $SETTINGS and run this again"
}

read_settings() {
    local from=$SETTINGS
    if [[ ! -f $from ]]; then
        from=$work/settings
    fi
    config_path=$ETC/apply-layer.env apply_service=quantum-apply-layer.service
    if [[ -f $from && -x $1/venv/bin/python ]]; then
        deploying "$1" values "$from" APPLY_CONFIG_PATH APPLY_SERVICE GOV_JOURNAL_DIR GOV_ARCHIVE_DIR >"$work/values" || die "$from: see above"
        { read -r config_path && read -r apply_service && read -r journal_dir && read -r archive_dir; } <"$work/values"
    fi
}

check_apply_layer() {
    if [[ ! -e $config_path ]]; then
        note "$config_path is not there: a disarm has nothing to set to dry run until it is"
    elif id -u "$ACCOUNT" >/dev/null 2>&1 && ! runuser -u "$ACCOUNT" -- test -r "$config_path"; then
        note "the governor cannot read $config_path, and so not see in which mode it is. Two commands mend it:"
        say "    chgrp $SHARED_GROUP $(dirname "$config_path") $config_path"
        say "    chmod g+rX $(dirname "$config_path") $config_path"
    fi
}

# -- for people -------------------------------------------------------------------------------------------------------

# for_people DEPLOY_DIRECTORY: the command, its man page and its completion; an earlier release may have only the first.
for_people() {
    put "command for people" 755 root root "$COMMAND" <"$1/bin/governor"
    beside "man page" "$1/man/governor.1" "$MAN_PAGE"
    beside "completion for bash" "$1/completions/governor.bash" "$COMPLETION"
}

# beside WHAT FROM PATH: there as it is in the release, or not at all.
beside() {
    local above
    if [[ -f $2 ]]; then
        above=$(dirname "$3")
        directory 755 root root "$(dirname "$above")"
        directory 755 root root "$above"
        put "$1" 644 root root "$3" <"$2"
    elif [[ -e $3 ]]; then
        change "$1: $3 removed" rm -f "$3"
    fi
}

# -- units ------------------------------------------------------------------------------------------------------------

# drop_in UNIT NAME COMMAND: what the command says becomes the drop-in; none is left where that is nothing.
drop_in() {
    local path=$UNITS/$1.d/$2.conf
    "$3" >"$work/drop-in"
    if [[ -s $work/drop-in ]]; then
        directory 755 root root "$UNITS/$1.d"
        { say '# Written by install.sh.' && say '[Service]' && cat "$work/drop-in"; } >"$work/whole"
        put "unit" 644 root root "$path" <"$work/whole"
    elif [[ -e $path ]]; then
        change "unit: $path removed" rm -f "$path"
    fi
}

plain_path() { [[ $1 =~ ^/[A-Za-z0-9._@:+,/-]*$ ]] || die "$2 is $1; expected a path of letters, digits and ._@:+,/- for systemd's units"; }

# What the Apply Layer's file needs where it is not in /etc/quantum: helper_lines for root's helper, reading for the service.
elsewhere() {
    case $config_path in
        /home/* | /root/* | /run/user/*) say "ProtectHome=$1" ;;
    esac
}
helper_lines() {
    if [[ $(dirname "$config_path") != "$ETC" ]]; then
        elsewhere no
        say "ReadWritePaths=-$(dirname "$config_path")"
    fi
}
own_lines() {
    local own
    elsewhere read-only
    for own in "$journal_dir" "$archive_dir"; do
        case $own in
            '' | "$STATE" | "$STATE"/*) ;;
            *)
                plain_path "$own" "a directory of $SETTINGS"
                say "ReadWritePaths=-$own"
                ;;
        esac
    done
}

install_units() {
    local from=$1 unit before=$changes
    local -a there=()
    for unit in "${OUR_UNITS[@]}"; do
        if [[ -f $from/systemd/$unit ]]; then
            put unit 644 root root "$UNITS/$unit" <"$from/systemd/$unit"
            there+=("$UNITS/$unit")
        elif [[ -e $UNITS/$unit ]]; then
            change "unit: $UNITS/$unit removed" rm -f "$UNITS/$unit"
        fi
    done
    plain_path "$config_path" APPLY_CONFIG_PATH
    if [[ -d $RELEASES/$release ]]; then
        drop_in "$SERVICE" credentials credential_lines
    fi
    if [[ -f $from/systemd/$DASHBOARD ]]; then
        drop_in "$DASHBOARD" credentials dashboard_lines
    fi
    drop_in "$SERVICE" paths own_lines
    drop_in quantum-governor-disarm@.service paths helper_lines
    drop_in quantum-governor-deadman.service paths helper_lines
    if ((changes > before)); then
        if [[ $dry_run == no ]]; then
            systemd-analyze --man=no verify "${there[@]}" || die "systemd does not accept the units; nothing was restarted"
        fi
        if systemd_runs; then
            change "systemd reads the units again" systemctl daemon-reload
        fi
    fi
}

enable_units() {
    local unit
    for unit in "$SOCKET" "$SERVICE"; do
        if ! systemctl is-enabled --quiet "$unit" 2>/dev/null; then
            change "$unit starts at boot" systemctl --quiet enable "$unit"
        fi
    done
}

# Everything a running governor was started from.
started_from() {
    {
        linked current
        # Not all of them need be there.
        cat "$SETTINGS" "$UNITS/$SERVICE" "$UNITS/$SERVICE".d/*.conf "$CREDENTIALS"/* "$ETC/limits.toml" || true
    } 2>/dev/null | sha256sum | cut -d ' ' -f 1
}

start_services() {
    local wanted socket_changed=no
    [[ $start == yes ]] || return 0
    if [[ $dry_run == yes && ! -f $BASE/started ]]; then
        change "$SERVICE started" true
        return 0
    fi
    if [[ $(sha256sum <"$UNITS/$SOCKET") != $(cat "$BASE/socket" 2>/dev/null || true) ]]; then
        socket_changed=yes
    fi
    if [[ $socket_changed == yes ]] || ! active "$SOCKET"; then
        change "$SOCKET listens" systemctl restart "$SOCKET"
        sha256sum <"$UNITS/$SOCKET" | remember socket
    fi
    wanted=$(started_from)
    # In a dry run the release is not switched, and so its restart not seen here.
    if [[ $wanted != $(cat "$BASE/started" 2>/dev/null || true) || ($dry_run == yes && $(linked current) != "releases/$release") ]] ||
        ! active "$SERVICE"; then
        change "$SERVICE restarted; waiting until it is ready" restart_governor
        remember started <<<"$wanted"
    fi
}
restart_governor() {
    systemctl reset-failed "$SERVICE" 2>/dev/null || true
    if ! timeout "$READY_WITHIN_S" systemctl restart "$SERVICE"; then
        systemctl show --property=ActiveState,SubState,Result,StatusText "$SERVICE" >&2 || true
        journalctl --quiet --no-pager --unit "$SERVICE" --lines 15 --output cat >&2 || true
        die "$SERVICE was not ready within $READY_WITHIN_S s. Meanwhile nothing is permitted. Back to the release before: $0 --rollback"
    fi
}
remember() {
    if [[ $dry_run == yes ]]; then
        return 0
    fi
    cat >"$work/remembered"
    install -m 600 "$work/remembered" "$BASE/$1"
}

# It is started by whoever wants it; one that runs goes on with what is installed now.
restart_dashboard() {
    local wanted
    [[ $start == yes ]] && active "$DASHBOARD" || return 0
    wanted=$({
        linked current
        cat "$SETTINGS" "$UNITS/$DASHBOARD" "$UNITS/$DASHBOARD".d/*.conf "$DASHBOARD_SETTINGS" "$DASHBOARD_CREDENTIALS"/* || true
    } 2>/dev/null | sha256sum | cut -d ' ' -f 1)
    if [[ $wanted != $(cat "$BASE/dashboard" 2>/dev/null || true) ]]; then
        change "$DASHBOARD restarted" systemctl restart "$DASHBOARD" || note "$DASHBOARD did not come back: journalctl -u $DASHBOARD"
        remember dashboard <<<"$wanted"
    fi
}

# The Apply Layer loads the gate that fails closed only when it starts; one that is stopped stays stopped.
restart_apply_layer() {
    if [[ $start == no || $release == $(cat "$BASE/applied" 2>/dev/null || true) ]]; then
        return 0
    fi
    if ! known "$apply_service"; then
        note "no unit $apply_service here: nothing to restart"
        return 0
    fi
    change "$apply_service restarted, to load the gate" systemctl try-restart "$apply_service" ||
        die "$apply_service did not come back: journalctl -u $apply_service"
    remember applied <<<"$release"
}

# -- the proof --------------------------------------------------------------------------------------------------------

# Its place belongs to the service's user: it is read and written with that user's rights.
as_account() { runuser -u "$ACCOUNT" -- "$@"; }
# shellcheck disable=SC2016 # the inner shell expands them
readonly WRITE_PROOF='umask 077; rm -f "$1.new" && cat >"$1.new" && mv -fT "$1.new" "$1"'

prove() {
    local code=0
    [[ $proof == yes && $start == yes ]] || return 0
    if ((changes == 0)) && [[ $(as_account tail -n 1 "$STATE/proof.txt" 2>/dev/null) == 'exit code: 0' ]]; then
        return 0
    fi
    if [[ $dry_run == yes ]]; then
        say "would: run deploy/proof.sh and keep what it says in $STATE/proof.txt"
        return 0
    fi
    "$CURRENT/deploy/proof.sh" 2>&1 | tee "$work/proof" || code=${PIPESTATUS[0]}
    say "exit code: $code" >>"$work/proof"
    as_account sh -c "$WRITE_PROOF" sh "$STATE/proof.txt" <"$work/proof" || die "$STATE/proof.txt could not be written"
    say "proof kept in $STATE/proof.txt"
    if ((code != 0)); then
        printf 'install.sh: installed and running, but the proof found something (exit code %s), see above\n' "$code" >&2
        exit 3
    fi
}

# -- what a run does --------------------------------------------------------------------------------------------------

do_install() {
    [[ -z $profile || -f $here/deploy/profiles/$profile.env ]] ||
        wrong "--profile $profile: expected one of $(cd "$here/deploy/profiles" && printf '%s ' *.env | sed 's/\.env//g')"
    find_python
    choose_release
    prepare_account
    prepare_directories
    prepare_release
    prepare_settings
    prepare_credentials
    check_settings
    read_settings "$RELEASES/$release"
    check_apply_layer
    switch_release
    for_people "$here/deploy"
    install_units "$here/deploy"
    enable_units
    start_services
    restart_dashboard
    restart_apply_layer
    prune_releases
    if ((changes == 0)); then
        say "nothing changed, nothing restarted: release $release"
    elif [[ $dry_run == yes ]]; then
        say "nothing was changed: this was a dry run"
    else
        say "installed: release $release"
    fi
    prove
}

do_rollback() {
    local before
    before=$(linked previous)
    [[ -n $before && -d $BASE/$before && $before != "$(linked current)" ]] || die "no release to go back to: $BASE/previous"
    release=${before#releases/}
    read_settings "$BASE/$before"
    change "active release: $release" switch_to "$release"
    for_people "$BASE/$before/deploy"
    install_units "$BASE/$before/deploy"
    start_services
    restart_dashboard
    say "rolled back to $release; installing the tree of the other one again would return to it"
}

confirm_uninstall() {
    local answer
    [[ $sure == no && $dry_run == no ]] || return 0
    [[ -t 0 ]] || die "--uninstall asks first and there is no terminal; --yes says that you mean it"
    say "This stops and removes Governor: without permits the Apply Layer does not trade."
    if [[ $keep_data == no ]]; then
        say "Settings, credentials, journal and archive are removed too; --keep-data keeps them."
    fi
    read -r -p "Remove it? Type yes: " answer
    [[ $answer == yes ]] || die "nothing was removed"
}

remove() {
    if [[ -e $1 || -L $1 ]]; then
        change "removed: $1" rm -rf "$1"
    fi
}
remove_empty() {
    if [[ -d $1 && -z $(ls -A "$1") ]]; then
        change "removed: $1" rmdir "$1"
    fi
}

do_uninstall() {
    local unit before
    confirm_uninstall
    read_settings "$CURRENT"
    if systemd_runs; then
        for unit in "$DASHBOARD" "$SERVICE" "$SOCKET" quantum-governor-deadman.service; do
            if active "$unit" || [[ -e $UNITS/$unit ]]; then
                change "$unit stopped" systemctl stop "$unit" || note "$unit could not be stopped"
            fi
        done
        if [[ $dry_run == no ]]; then
            systemctl stop 'quantum-governor-disarm@*.service' || note "a disarm under way could not be stopped"
            # Made by systemd for these, and kept until the next boot otherwise.
            systemctl stop 'system-quantum\x2dgovernor\x2ddisarm.slice' || true
        fi
    fi
    for unit in "$DASHBOARD" "$SERVICE" "$SOCKET"; do
        if [[ -e $UNITS/$unit ]] && { [[ $unit != "$DASHBOARD" ]] || systemctl is-enabled --quiet "$unit" 2>/dev/null; }; then
            change "$unit does not start at boot any more" systemctl --quiet disable "$unit" || note "$unit could not be disabled"
        fi
    done
    before=$changes
    for unit in "${OUR_UNITS[@]}"; do
        remove "$UNITS/$unit"
        remove "$UNITS/$unit.d"
    done
    if ((changes > before)) && systemd_runs; then
        change "systemd reads the units again" systemctl daemon-reload
        systemctl reset-failed 'quantum-governor*' 2>/dev/null || true
    fi
    if [[ -f $COMMAND ]] && grep -qF "$CURRENT" "$COMMAND"; then
        remove "$COMMAND"
        remove "$MAN_PAGE"
        remove "$COMPLETION"
        remove_empty "$(dirname "$MAN_PAGE")"
        remove_empty "$(dirname "$COMPLETION")"
        remove_empty "$SHARE/bash-completion"
    fi
    remove "$BASE"
    remove_empty /opt/quantum
    remove /run/quantum-governor-disarm.sock
    remove "$config_path.lock"
    remove "$config_path.disarm-pending"
    if [[ $keep_data == yes ]]; then
        note "kept: $SETTINGS, $CREDENTIALS, those of the dashboard, $STATE, and the user $ACCOUNT they belong to"
    else
        remove "$SETTINGS"
        remove "$CREDENTIALS"
        remove "$DASHBOARD_SETTINGS"
        remove "$DASHBOARD_CREDENTIALS"
        remove "$STATE"
        remove "$HELPER_STATE"
        remove_account
    fi
    if compgen -G "$config_path.bak.*" >/dev/null; then
        note "backups of the Apply Layer's file stay, they may hold its secrets: $config_path.bak.*"
    fi
    note "the events stay in Redis, and the Apply Layer's own files as they are"
    if [[ $dry_run == yes ]]; then
        say "nothing was changed: this was a dry run"
    elif ((changes == 0)); then
        say "nothing to remove"
    else
        say "removed"
    fi
}

remove_account() {
    if id -u "$ACCOUNT" >/dev/null 2>&1; then
        change "user $ACCOUNT removed" userdel "$ACCOUNT"
    fi
    if [[ $dry_run == no ]] && getent group "$ACCOUNT" >/dev/null; then
        groupdel "$ACCOUNT"
    fi
    remove_empty "$ETC"
    # The group may be the Apply Layer's as well: it goes where nobody is in it and nothing in /etc/quantum has it.
    if [[ $dry_run == no ]] && group_is_unused; then
        change "group $SHARED_GROUP removed" groupdel "$SHARED_GROUP"
    fi
}

group_is_unused() {
    local gid members
    IFS=: read -r _ _ gid members < <(getent group "$SHARED_GROUP") || return 1
    [[ -z $members ]] && ! getent passwd | cut -d : -f 4 | grep -qx "$gid" &&
        ! { [[ -e $ETC ]] && find "$ETC" -gid "$gid" | grep -q .; }
}

main() {
    while (($# > 0)); do
        case $1 in
            --dry-run) dry_run=yes ;;
            --no-start) start=no ;;
            --no-proof) proof=no ;;
            --keep-data) keep_data=yes ;;
            --yes) sure=yes ;;
            --rollback | --uninstall)
                [[ $action == install ]] || wrong "one of --rollback and --uninstall"
                action=${1#--}
                ;;
            --profile | --wheelhouse | --python)
                [[ -n ${2:-} ]] || wrong "$1 needs a value"
                printf -v "${1#--}" '%s' "$2"
                shift
                ;;
            -h | --help)
                usage
                return 0
                ;;
            *) wrong "unknown: $1" ;;
        esac
        shift
    done
    if [[ -n $wheelhouse ]]; then
        [[ -d $wheelhouse ]] || wrong "--wheelhouse $wheelhouse: expected a directory"
        wheelhouse=$(cd "$wheelhouse" && pwd -P)
    fi
    require_host
    "do_$action"
}

main "$@"
