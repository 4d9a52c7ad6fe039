#!/usr/bin/env bash
# site.sh HOME NEXT ARGUMENTS...: reads the site file, then becomes the script NEXT.
#
# The site file is the user's bash and may change anything of the shell that reads it: IFS, options, traps, functions,
# variables. NEXT starts in a shell of its own, which inherits only what it should: the environment, limits and umask.
# Functions that the user's shell exports are here, because `module` may be one; those that hide a builtin of bash are not.
builtin unset -f $(builtin compgen -b)
readonly gspo_home=$1 gspo_next=("${@:2}")
# `sbatch --export=NONE` leaves the job without these; the PATH that bash takes then may end in the present directory.
export PATH=${PATH%:.} HOME=${HOME:-~}
# The site file: $GSPO_SITE, else launch/site.sh of the checkout, else none. What it sets, sbatch's environment may override
# only if it says so itself, with ${NAME:-value} as the example does.
readonly gspo_site=${GSPO_SITE:-$gspo_home/launch/site.sh}
# Within the EXIT trap bash counts lines from 1 again.
gspo_line=1
# `exec` with a program; with redirections only it changes the shell's own files.
readonly gspo_exec='^((builtin|command) +)*exec +(-[acl]+ +)*[^-<>{&0-9]'
readonly gspo_dead='^((builtin|command) +)*set +([-+][a-zA-Z]+ +)*(-[a-zA-Z]*[nr]|-o +(noexec|restricted))'
gspo_reported=0 gspo_last=''
# What SLURM says of the job.
gspo_job=()
for gspo_name in "${!SLURM_@}"; do gspo_job+=("$gspo_name=${!gspo_name}"); done
readonly gspo_job

gspo_refuse() { # one sentence, exit 2
    trap - DEBUG ERR EXIT
    echo "gspo: $*" >&2
    builtin exit 2
}

gspo_command_failed() { # STATUS LINE COMMAND: a program that is missing is an error, another failure may be meant
    local where="the site file $gspo_site, line $2: \`$3\`"
    # shellcheck disable=SC2016
    if [ "$3" = '. "$gspo_site" ""' ]; then # its last line has failed and was reported, or it returned
        [[ $gspo_last != return* || $gspo_reported = "$gspo_line" ]] ||
            echo "gspo: the site file $gspo_site, line $gspo_line: \`$gspo_last\` ended it with $1 and the job goes on without the lines after it; correct the line, or end with \`return 0\`" >&2
        return 0
    fi
    [[ $- != *e* ]] || return 0                # `set -e` of the site file: the EXIT trap reports it
    [ "$1" != 127 ] ||
        gspo_refuse "$where: command not found; define it there first (for module: see launch/site.example.sh), or remove the line"
    gspo_reported=$2
    echo "gspo: $where ended with $1 and the job goes on; correct the line, or add \`|| true\` if that is expected" >&2
}

gspo_ended() { # `exit`, or bash itself, as for ${NAME:?}
    gspo_refuse "the site file $gspo_site, line $gspo_line, ended the script; correct the line (bash's own message, if any, is above), and use no exit"
}

exit() { # the site file may have an EXIT trap of its own, which replaces ours
    # shellcheck disable=SC2031
    [ "$BASH_SUBSHELL" = 0 ] || builtin exit "$@"
    gspo_ended
}

gspo_look() { # SOURCE LINE COMMAND: where the site file is, and whether it is about to become another program
    [[ $1 != "$gspo_site" || $2 -lt $gspo_line ]] || gspo_line=$2
    [[ $1 = "$0" ]] || gspo_last=$3
    [[ $BASH_SUBSHELL != 0 || ! $3 =~ $gspo_dead ]] ||
        gspo_refuse "the site file $gspo_site, line $gspo_line: \`$3\` would leave a shell that runs nothing more; remove the line"
    [[ $BASH_SUBSHELL != 0 || ! $3 =~ $gspo_exec ]] ||
        gspo_refuse "the site file $gspo_site, line $gspo_line: \`$3\` would take the place of the job's script; call it without exec"
}

gspo_restore() { # facts of the job, which no site file means to change, and what signals do
    local pair
    for pair in ${gspo_job[@]+"${gspo_job[@]}"}; do
        [ -n "$(command printenv "${pair%%=*}")" ] || export "${pair?}"
    done
    trap - {1..31}
}

gspo_check_file() { # what would end in a bare line of bash's, or in values with an invisible character
    local fault
    [ ! -d "$gspo_site" ] || gspo_refuse "the site file $gspo_site is a directory; name a file in GSPO_SITE"
    [ -r "$gspo_site" ] || gspo_refuse "the site file $gspo_site cannot be read by $(command id -un); correct its permissions"
    ! command grep -q $'\r$' "$gspo_site" ||
        gspo_refuse "the site file $gspo_site has Windows line ends; remove them: sed -i 's/\\r\$//' $gspo_site"
    fault=$("$BASH" -n "$gspo_site" 2>&1) ||
        gspo_refuse "the site file cannot be read: ${fault%%$'\n'*}; correct that line (launch/site.example.sh shows the form)"
}

gspo_check_result() { # what the next script could not work with; exports the settings
    local name said
    command -v id >/dev/null ||
        gspo_refuse "the site file $gspo_site leaves PATH=${PATH-} without the system's programs; add to it: PATH=/new/bin:\$PATH"
    said=$(command id -u 2>&1 >/dev/null) ||
        gspo_refuse "after the site file $gspo_site no program starts (${said%%$'\n'*}); correct its LD_LIBRARY_PATH, LD_PRELOAD or ulimit"
    for name in "${!GSPO_@}"; do
        [[ ${!name@a} != *[aA]* ]] ||
            gspo_refuse "the site file $gspo_site makes $name an array, which a job does not inherit; write one text, $name=..."
        export "${name?}"
    done
}

if [ -e "$gspo_site" ]; then
    gspo_check_file
    set -T # the traps also see the lines of functions and of files that it reads
    trap 'gspo_look "${BASH_SOURCE[0]-}" "$LINENO" "$BASH_COMMAND"' DEBUG
    trap 'gspo_command_failed $? "$LINENO" "$BASH_COMMAND"' ERR
    trap gspo_ended EXIT
    # An empty argument: `shift` and `set --` of the site file are its own. Without -eu: module systems need that.
    # shellcheck source=/dev/null
    . "$gspo_site" ""
    trap - DEBUG ERR EXIT
    set +eu +T
elif [ -n "${GSPO_SITE:-}" ]; then
    gspo_refuse "GSPO_SITE=$gspo_site does not exist; correct it, or unset it"
fi
gspo_check_result
gspo_restore
exec "$BASH" -p "${gspo_next[@]}"
