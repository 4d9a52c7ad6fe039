# From the first start of a role to the verdict. Sourced; uses `plan`, `attempt`, `run_dir`, `step` (pid of each role's srun).

task_says='^ *[0-9]*:\? *trainer-[0-9]* on .*, process ' # launch/lib/task.py, with --label's rank in front
grace=${GSPO_GRACE:-240} # seconds that the trainers have for a checkpoint; the job hears of its end 300 s before it

newest_checkpoint() { # number of the newest complete one's step, 0 without any
    local marker newest=0 number
    for marker in "$run_dir"/checkpoints/step_*/COMPLETE; do
        [ -f "$marker" ] || continue
        number=${marker%/COMPLETE}
        number=$((10#${number##*/step_}))
        [ "$number" -gt "$newest" ] && newest=$number
    done
    echo "$newest"
}

on_usr1() { # the time limit is near, or the user asks: the trainers save and end with 85
    [ -n "$asked" ] && return
    asked=$SECONDS
    echo "gspo: asked to stop (USR1); the trainers have $grace s for a checkpoint"
}

pass_on() { # again and again, from when every rank holds the signal back until it can act on it; earlier it would end one
    [ -n "$asked" ] && [ $(((SECONDS - asked) % 5)) = 0 ] || return 0
    local ranks=$(($(wc -w <<<"${plan[trainer_hosts]//,/ }") * plan[trainer_each]))
    [ "$(cat "$attempt"/trainer-*.log 2>/dev/null | grep -c "$task_says")" -lt "$ranks" ] || kill -USR1 "${step[trainer]}" 2>/dev/null || true
}

on_term() { # scancel, or a requeue by SLURM: it ends the roles itself
    # SLURM asks more than once, and everything that this script has started: what counts the checkpoints, too.
    trap '' TERM
    echo "gspo: SLURM ends this attempt (scancel, a lost node, or its limit); $(newest_checkpoint) is the newest complete checkpoint"
    exit 143
}

watch_roles() { # returns when the first role has ended; its kind goes into `first`, its code into `code`
    local kind
    while :; do
        # Servers first: their end takes the others with it, not the other way round.
        for kind in rollout controller trainer; do
            if ! kill -0 "${step[$kind]}" 2>/dev/null; then
                sleep 2
                first=$(find_culprit "$kind")
                code=0
                wait "${step[$first]}" || code=$?
                # Of several codes srun tells the highest: the first to stop as asked gets its neighbours killed.
                grep -q 'exit code 85' "$attempt/srun-trainer.txt" && first=trainer code=85
                return 0
            fi
        done
        if [ -n "$asked" ] && [ $((SECONDS - asked)) -gt "$grace" ]; then
            echo "gspo: no checkpoint within $grace s; the unfinished step will be done again"
            first=trainer code=85
            return
        fi
        pass_on
        # A trapped signal ends `wait` early, not the loop.
        sleep 1 &
        wait $! || true
    done
}

find_culprit() { # KIND seen to end first -> the kind that is the reason: of several, the one whose task a signal killed
    local kind
    for kind in rollout controller trainer; do
        if ! kill -0 "${step[$kind]}" 2>/dev/null && [[ $(first_end "$kind") =~ Killed|Aborted|fault|error$ ]]; then
            echo "$kind"
            return
        fi
    done
    echo "$1"
}

first_end() { # KIND -> srun's words on its first task that ended badly
    grep -E -m1 'error: [^ ]+: tasks? |Node failure on' "$attempt/srun-$1.txt" || true
}

end_roles() { # only the job's own steps; what is killed here has no state
    local kind
    for kind in "${!step[@]}"; do kill -TERM "${step[$kind]}" 2>/dev/null || true; done
    for kind in "${!step[@]}"; do wait "${step[$kind]}" 2>/dev/null || true; done
}

explain() { # KIND CODE: the end of the culprit's log, then one sentence
    local kind=$1 words node='' log said
    words=$(first_end "$kind")
    words=${words:-$(tail -n1 "$attempt/srun-$kind.txt")}
    if [[ $words =~ error:\ ([^ ]+):\ tasks?\ [^:]*:\ (.*) ]]; then
        node=${BASH_REMATCH[1]} said=${BASH_REMATCH[2]}
    elif [[ $words =~ Node\ failure\ on\ ([^ ]+) ]]; then
        node=${BASH_REMATCH[1]} said="the node is lost"
    else
        said="${words:-it said nothing} (srun ended with $2)"
    fi
    log=$attempt/$kind-$node.log
    # A step that could not start has no log.
    [ -f "$log" ] || log=$(ls -t "$attempt/$kind"-*.log 2>/dev/null | head -n1) || true
    if [ -f "$log" ]; then
        tail -n 15 "$log" | sed "s/^/  $kind${node:+ $node} | /"
        # Words of the role itself say more than its exit code; of a killed one there are none.
        [[ $said == Exited* ]] && said=$(grep -vE '^[0-9: ]*$|^ *([0-9]+: )?(slurmstepd|srun)' "$log" | tail -n1 | sed 's/^ *[0-9]*: //')
    fi
    echo "gspo: $kind failed${node:+ on $node}: $said (log: ${log:-$attempt})"
}

node_is_lost() { # whether a node of the job no longer runs even `true`
    local command all nodes
    all=$(IFS=,; echo "${hosts[*]}")
    nodes=${#hosts[@]}
    [ -n "${SLURM_HET_SIZE:-}" ] && return 1
    ! timeout 40 srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "--nodelist=$all" --overlap --input=none true \
        >"$attempt/srun-alive.txt" 2>&1
}

refuse_if_replaced() { # ends an attempt whose job runs elsewhere by now: this node was cut off
    local newest job
    read -r newest job <"$run_dir/attempt"
    [ "$newest" -gt "${plan[number]}" ] || return 0
    echo "gspo: attempt ${plan[number]} was replaced by attempt $newest; this one ends"
    exit 1
}

await_slurm() { # returns once slurmctld answers: one that restarts says nothing about the nodes, and queues nothing
    local since=$SECONDS said=''
    until scontrol show job -o "$SLURM_JOB_ID" >/dev/null 2>&1; do
        refuse_if_replaced
        [ -n "$said" ] || echo "gspo: slurmctld does not answer; waiting for it"
        said=yes
        if [ $((SECONDS - since)) -gt 900 ]; then
            echo "gspo: it does not come back; to go on: $resume"
            exit 1
        fi
        sleep 2
    done
    refuse_if_replaced
}

settle() { # the verdict: the DONE marker, never an exit code, says that the run is finished
    local now
    end_roles
    now=$(newest_checkpoint)
    # Where the network is gone the roles take a minute to end: the attempt that runs elsewhere may be done meanwhile.
    refuse_if_replaced
    if [ -f "$run_dir/DONE" ]; then
        echo "gspo: DONE; results are in $run_dir"
        exit 0
    fi
    await_slurm
    # Without a newer checkpoint it would be queued again and again, and never get further.
    if [ "$first" = trainer ] && [ "$code" = 85 ] && [ "$now" -gt "$started_from" ]; then
        echo "gspo: attempt ${plan[number]} stopped as asked; step $now is checkpointed"
        requeue
    fi
    explain "$first" "$code" >"$attempt/failure.txt"
    local limit=${GSPO_MAX_RESTARTS:-3} so_far=0 why=''
    [ -f "$run_dir/logs/restarts" ] && so_far=$(wc -l <"$run_dir/logs/restarts")
    [ "$now" -gt "$started_from" ] && why="a newer checkpoint exists (step $now)"
    # Asked in any case: it takes until SLURM knows too, which would otherwise queue the job for the same node again.
    node_is_lost && why="a node is lost"
    if [ -n "$why" ] && [ "$so_far" -lt "$limit" ]; then
        cat "$attempt/failure.txt"
        echo "$(date -u +%FT%TZ) attempt ${plan[number]}: $why" >>"$run_dir/logs/restarts"
        echo "gspo: restart $((so_far + 1)) of at most $limit, because $why"
        requeue
    fi
    echo "gspo: not restarted: $([ -n "$why" ] && echo "$limit restarts are used up (GSPO_MAX_RESTARTS; remove $run_dir/logs/restarts to begin anew)" ||
        echo "there is no newer checkpoint than step $started_from, so it would fail the same way")"
    # Last, so that the reason is what the log ends with.
    cat "$attempt/failure.txt"
    exit 1
}

requeue() { # `scontrol requeue` kills this script, so nothing may come after it
    if [[ $(scontrol show job -o "$SLURM_JOB_ID") != *" Requeue=1 "* ]]; then
        echo "gspo: the job was submitted with --no-requeue; to go on: $resume"
        exit 85
    fi
    rm -f "$attempt/key"
    # The end that SLURM brings now is the one that was asked for.
    trap 'exit 85' TERM
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
    exit 85
}
