#!/usr/bin/env bash
# Writes the server's ACL file, made from users.acl, to standard output:
#
#   users.sh --passwords DIR [--prefix quantum] [--suffix ""]
#
# DIR has a file a user with its password; a missing one is made, readable by its owner alone. The same directory
# gives the same file again. The ACL file has hashes only.
# --prefix is GOV_KEY_PREFIX. --suffix is put behind each user's name, for a second account on the same server; then
# `default` and `admin` are left out, as the first account's output has them: append the second one to the first.
set -euo pipefail
shopt -s inherit_errexit

fail() {
  printf 'users.sh: %s\n' "$1" >&2
  exit 2
}

prefix=quantum suffix='' passwords=''
while (($#)); do
  case $1 in
    --prefix | --suffix | --passwords)
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    *) fail "$1 is no option, expected --passwords, --prefix or --suffix" ;;
  esac
done
[[ -n $passwords ]] || fail "--passwords is missing: the directory of the users' passwords"
# Other characters mean something in a pattern, in a rule or in the template.
[[ $prefix =~ ^[A-Za-z0-9_.:@{}-]+$ ]] || fail "--prefix is '$prefix', expected letters, digits and _.:@{}-"
[[ $suffix =~ ^[A-Za-z0-9_.-]*$ ]] || fail "--suffix is '$suffix', expected letters, digits and _.-"

umask 077
mkdir -p -- "$passwords"

hash_of() { # of a user's password
  local file=$passwords/$1 password
  if [[ ! -e $file ]]; then
    password=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    printf '%s\n' "$password" >"$file.new"
    mv -- "$file.new" "$file"
  fi
  password=$(<"$file")
  [[ $password =~ ^[!-~]{16,}$ ]] || fail "$file: expected one line of at least 16 printable characters without spaces"
  printf '%s' "$password" | sha256sum | cut -d' ' -f1
}

# One line a user, without comments. All of it or nothing: half a file would lock the others out.
lines=$(
  sed -e 's/#[^@].*//' -e '/^#$/d' -e '/^[[:space:]]*$/d' -e "s|@PREFIX@|$prefix|g" "$(dirname -- "$0")/users.acl" |
    sed -e ':a' -e 'N' -e '$!ba' -e 's/\n[[:space:]]\{1,\}/ /g' |
    while read -r _ name rules; do
      if [[ -n $suffix && ($name == default || $name == admin) ]]; then continue; fi
      if [[ $rules == *@HASH@* ]]; then
        hash=$(hash_of "$name$suffix")
        rules=${rules/@HASH@/$hash}
      fi
      printf 'user %s%s %s\n' "$name" "$suffix" "$rules"
    done
)
printf '%s\n' "$lines"
