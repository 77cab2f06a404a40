"""Faults that a first day may bring (bench/results/first-day.md): the mend is taken out again (tests/plant.py)."""

# What is wrong: file, its text, what stands there instead, and the tests that must see it.
FIRST_DAY = {
    "no record is asked whether there were checkpoints": (
        "train/ready.py", "begin_anew(run_dir, run_dir.known_commit())", "begin_anew(run_dir, None)",
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "what was never committed is deleted at once": (
        "train/checkpoint/uncommitted.py", "path.rename(aside)", "shutil.rmtree(path)",
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "metrics prove a checkpoint": (
        "core/run_dir.py", "return max(steps) or None",
        'return max([*steps, *(line["step"] for line in read_lines(self.metrics))]) or None',
        ["tests/train/checkpoint/test_uncommitted.py", "-k", "metrics_alone"],
    ),
    "a state that SLURM did not say is CANCELLED": (
        "launch/slurm/job.py", 'state not in ("RUNNING", "")', 'state != "RUNNING"',
        ["tests/launch/test_attempts.py", "-k", "nobody_knows"],
    ),
    "programs end by the interpreter's finalization": (
        "core/program.py", "        end_process(status)\n", "        sys.exit(status)\n",
        ["tests/core/test_programs.py", "-k", "at_the_end"],
    ),
    "what was printed is lost with the stream it was printed on": (
        "core/terminal.py", "            stream.flush()\n", "            pass\n",
        ["tests/core/test_programs.py", "-k", "not_lost"],
    ),
    "an sbatch that names no job gives one without a number": (
        "launch/slurm/slurm.py", 'raise Unclear(f"sbatch answered {answer!r}, which is no job number")',
        "return answer", ["tests/launch/test_undone.py", "-k", "names_no_job"],
    ),
    "SLURM is asked once": (
        "launch/slurm/clean.sh", '&& [ -n "$answer" ] && break', "; break",
        ["tests/launch/test_attempts.py", "-k", "until_it_answers"],
    ),
    "a file system without locks holds every lock": (
        "core/locks.py", "if error.errno not in UNSUPPORTED:\n            raise", "return False",
        ["tests/launch/test_refused.py", "-k", "without_locks"],
    ),
    "who asks for the holder locks the others out": (
        "core/run_dir.py", "LOOK = 2.0", "LOOK = 0.0", ["tests/launch/test_refused.py", "-k", "starters_way"],
    ),
    "a file that is not there is worth another attempt": (
        "core/errors.py", "(PermissionError, FileNotFoundError, Not", "(PermissionError, Not",
        ["tests/launch/test_missing.py", "-k", "missing_is_a_mistake"],
    ),
    "what vanishes in the first attempt ends the run": (
        "core/errors.py", "(_trained or restarted() > 0) and (", "restarted() > 0 and (",
        ["tests/launch/test_missing.py", "-k", "vanishes"],
    ),
    "a worker hears a SIGHUP that nohup ignores": (
        "train/faults/stop.py", "if number not in (signal.SIGINT, signal.SIGHUP) or", "if number != signal.SIGINT or",
        ["tests/launch/test_signals.py"],
    ),
    "the launcher hears a SIGHUP that nohup ignores": (
        "launch/local/local.py", "if signal.getsignal(number) != signal.SIG_IGN]", "]",
        ["tests/launch/test_signals.py"],
    ),
    "the newest checkpoint's lost marker costs its steps": (
        "train/ready.py", "else commit_newer(folder, looking.path)", "else False",
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "an empty marker is a commit": (
        "train/checkpoint/checkpoint.py", "bool(size_of(path / MARKER))", "size_of(path / MARKER) is not None",
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "a second launch writes before it is refused": (
        "launch/__main__.py", '    with run.lock("launch.lock"):',
        '    open_run(run, launch.resolved, default_values())\n    with run.lock("launch.lock"):',
        ["tests/launch/test_refused.py", "-k", "second_launch"],
    ),
    "a refused sbatch leaves what it wrote": (
        "launch/slurm/slurm.py", "if not jobs:\n            before.restore()", "if not jobs:\n            pass",
        ["tests/launch/test_refused.py", "-k", "refused_sbatch"],
    ),
    "Ctrl-C reaches sbatch": (
        "launch/slurm/slurm.py", "text=True, start_new_session=True,", "text=True,",
        ["tests/launch/test_undone.py", "-k", "takes_the_job_back"],
    ),
    "Ctrl-C leaves what was written": (
        "launch/slurm/slurm.py", "before.restore()\n        raise\n    except Base", "raise\n    except Base",
        ["tests/launch/test_undone.py", "-k", "takes_the_job_back"],
    ),
    "Ctrl-C deletes the folder of a job that has begun": (
        "launch/slurm/slurm.py", "if jobs and (left := _take_back(jobs, run)):", "if jobs and (left := []):",
        ["tests/launch/test_undone.py", "-k", "has_begun"],
    ),
    "a full disk at submission takes the id": (
        "launch/__main__.py", "with undone_on_failure(run, new):", "if new or not new:",
        ["tests/launch/test_undone.py", "-k", "full_disk_at"],
    ),
    "a config alone takes an id": (
        "train/checkpoint/resume.py", "not run.config.exists() or not run.has_begun()", "not run.config.exists()",
        ["tests/launch/test_undone.py", "-k", "config_alone"],
    ),
    "a folder on NFS can't be locked": (
        "core/locks.py", "errno.EINVAL, errno.EBADF)", "errno.EINVAL)", ["tests/core/test_locks.py"],
    ),
    "two downloads of one file share their part": (
        "data/storage/cache.py", '.{secrets.token_hex(6)}.part"', '.part"', ["tests/core/test_locks.py", "-k", "cache"],
    ),
    "a file that was deleted while it came is an error": (
        "data/storage/cache.py", 'lock("names"), contextlib.suppress(FileNotFoundError):', 'lock("names"):',
        ["tests/core/test_locks.py", "-k", "cache"],
    ),
    "a deadline of a dead job holds": (
        "launch/local/local.py", "        if not holds:", "        if False:", ["tests/launch/test_environment.py"],
    ),
    "a run that is started by hand obeys a dead job's deadline": (
        "train/faults/stop.py", "limit is not None and limit > time.time()", "limit is not None",
        ["tests/launch/test_signals.py"],
    ),
    "a status may hold any kind of step": (
        "core/run_dir.py", "return step if isinstance(step, int) else 0", "return step or 0",
        ["tests/launch/test_signals.py", "-k", "another_hand"],
    ),
    "a line of attempts may lack anything": (
        "launch/attempts.py", '{"none of ours"})]', "set())]", ["tests/launch/test_signals.py", "-k", "another_hand"],
    ),
    "an upload that waits may lie anywhere": (
        "train/checkpoint/uploads.py", "isinstance(name, str) and STEP.fullmatch(name)]", "isinstance(name, str)]",
        ["tests/launch/test_signals.py", "-k", "another_hand"],
    ),
    "SIGTERM is no request": (
        "train/faults/stop.py", "STOP_SIGNALS = (signal.SIGTERM, ", "STOP_SIGNALS = (",
        ["tests/launch/test_ends.py", "-k", "how_it_ended"],
    ),
    "a run under nohup ends with its terminal": (
        "train/faults/stop.py", "if number not in (signal.SIGINT, signal.SIGHUP) or", "if number != signal.SIGINT or",
        ["tests/launch/test_ends.py", "-k", "how_it_ended"],
    ),
    "orphans of a killed worker live on": (
        "launch/local/local.py", "    end_children(ORPHANS, others)\n", "",
        ["tests/launch/test_launch.py", "-k", "nothing_is_left"],
    ),
    "orphans of a killed worker are not known": (
        "launch/local/local.py", "        control(SUBREAPER, 1, 0, 0, 0)\n", "",
        ["tests/launch/test_launch.py", "-k", "nothing_is_left"],
    ),
    "a launch ends the other children of its process": (
        "launch/local/local.py", "end_children(ORPHANS, others)", "end_children(ORPHANS)",
        ["tests/launch/test_missing.py", "-k", "as_it_was"],
    ),
    "a launch leaves its process a reaper of orphans": (
        "launch/local/local.py", "prctl(SUBREAPER, before.value,", "prctl(SUBREAPER, 1,",
        ["tests/launch/test_missing.py", "-k", "as_it_was"],
    ),
    "an answer that got lost is a refusal": (
        "launch/slurm/slurm.py", "if any(words in said for words in NOT_HEARD):", "if False:",
        ["tests/launch/test_refused.py", "-k", "got_lost"],
    ),
    "an older job is taken for the new one": (
        "launch/slurm/slurm.py", " and _epoch(submitted) >= int(since)", "",
        ["tests/launch/test_refused.py", "-k", "got_lost"],
    ),
    "a job that waits for room is not looked for": (
        "launch/slurm/slurm.py", "if number in jobs or says == mark", "if number in jobs",
        ["tests/launch/test_refused.py", "-k", "waits_for_room"],
    ),
    "two submissions at once": (
        "launch/slurm/slurm.py", 'with run.lock("launch.lock"):', "if True:",
        ["tests/launch/test_refused.py", "-k", "two_submissions"],
    ),
    "a key that is new is a difference": (
        "train/checkpoint/resume.py", "if key not in before and key in usual and after[key] == usual[key]:",
        "if False:", ["tests/launch/test_refused.py", "-k", "upgrade"],
    ),
    "the end waits for uploads": (
        "train/checkpoint/uploads.py", "self._thread.join(seconds)", "self._thread.join(seconds + 10)",
        ["tests/train/checkpoint/test_uploads.py", "-k", "never_ends"],
    ),
    "what an upload command has started lives on": (
        "train/checkpoint/uploads.py", "os.killpg(child.pid, number)", "child.send_signal(number)",
        ["tests/train/checkpoint/test_uploads.py", "-k", "never_ends"],
    ),
    "waiting uploads are not written down": (
        "train/checkpoint/uploads.py", "self._paths.append(path)\n            self._write()",
        "self._paths.append(path)",
        ["tests/train/checkpoint/test_uploads.py", "-k", "never_ends"],
    ),
    "a full disk is a crash": (
        "launch/attempts.py", "        return NO_ROOM\n", "        return CRASHED\n",
        ["tests/launch/test_full_disk.py", "-k", "named or not_begun"],
    ),
    "attempts without room count": (
        "launch/attempts.py", "sum(ended != NO_ROOM for", "sum(True for",
        ["tests/launch/test_full_disk.py", "-k", "count_toward"],
    ),
    "a line of attempts that found no room is lost": (
        "launch/attempts.py", "error.strerror, self._waiting[-1])", "error.strerror, self._waiting.pop())",
        ["tests/launch/test_full_disk.py", "-k", "count_toward"],
    ),
    "pauses do not grow": (
        "launch/room.py", "min(max(waited, shortest), longest)", "shortest",
        ["tests/launch/test_full_disk.py", "-k", "pauses"],
    ),
    "a rank that holds the interpreter's lock is not killed": (
        "train/faults/watchdog.py", "signal.setitimer(signal.ITIMER_REAL, ends.killed)", "pass",
        ["tests/train/faults/test_faults.py", "-k", "interpreters_lock"],
    ),
    "groups of a mesh have torch's own time-out": (
        "train/parallel/mesh.py", "ranks, timeout=timeout, backend=", "ranks, backend=",
        ["tests/train/parallel/test_timeouts.py", "-k", "every_group"],
    ),
    "nobody looks after wandb's processes": (
        "train/monitor/wandb_log.py", "if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:",
        "if False:",
        ["tests/train/monitor/test_wandb.py", "-k", "death"],
    ),
    "a last validation closes the step that may follow": (
        "train/monitor/wandb_log.py", "        if merge:\n            step -= 1\n", "        merge = False\n",
        ["tests/train/monitor/test_wandb.py", "-k", "finished_run"],
    ),
    "a backlog has all the time of its thread": (
        "train/monitor/wandb_log.py", "SHARE = 0.1", "SHARE = 1.0", ["tests/train/monitor/test_wandb.py", "-k",
        "small_share"],
    ),
    "no clock runs after the last save": (
        "train/faults/ending.py", "    timer.start()\n", "", ["tests/train/faults/test_ending.py", "-k", "closes"],
    ),
    "children outlive a process": (
        "train/faults/ending.py", "end_children(0.0)", "pass", ["tests/train/faults/test_ending.py"],
    ),
    "a key file is code": (
        "launch/snapshot.py", 'name.startswith(".env") or name in', "name in",
        ["tests/launch/test_snapshot.py", "-k", "nested"],
    ),
    "a repository within is passed over": (
        "launch/snapshot.py", "if not path.is_dir():", "if True:", ["tests/launch/test_snapshot.py", "-k", "nested"],
    ),
    "the copy is everybody's to read": (
        "launch/snapshot.py", ".st_mode & 0o777 & ~umask())", ".st_mode & 0o777)",
        ["tests/launch/test_snapshot.py", "-k", "nested"],
    ),
    "W&B records the command as it was given": (
        "train/monitor/wandb_log.py", "sys.argv[1:] = without_secrets(sys.argv[1:])", "pass",
        ["tests/train/monitor/test_wandb.py", "-k", "holds_a_secret"],
    ),
    "a time without an end": (
        "train/faults/config.py", 'timeout_minutes: float = bounded(10.0, "(0, 1000000]")',
        'timeout_minutes: float = bounded(10.0, "(0, inf)")', ["tests/core/test_ranges.py", "-k", "longest_time"],
    ),
    "numbers of any size": (
        "core/ranges.py", "isinstance(value, int) and abs(value) > LARGEST", "False",
        ["tests/core/test_ranges.py", "-k", "message_names"],
    ),
    "an address keeps its token": (
        "train/__main__.py", "without_secrets(call.plain)", "call.plain",
        ["tests/train/monitor/test_wandb.py", "-k", "holds_a_secret"],
    ),
    "a header keeps its token": (
        "core/secrets.py", r"(\bauthorization:\s*(?:\w+\s+)?)", r"(\bauthorization:\s*)",
        ["tests/launch/test_snapshot.py"],
    ),
    "an assignment keeps its token": (
        "core/secrets.py", "|access_?key)", ")",
        ["tests/launch/test_snapshot.py"],
    ),
    "the launcher's config keeps a token": (
        "train/config.py", "without_secrets(composed.plain())", "composed.plain()",
        ["tests/launch/test_undone.py", "-k", "secret"],
    ),
    "float32 may share the tokens of a sample on GPUs": (
        "train/parallel/mesh.py", "if on_gpus and sequence > 1 and", "if False and", ["tests/gpu/test_presets.py"],
    ),
    "SBATCH_ variables reach sbatch": (
        "launch/slurm/slurm.py", '"SLURM_", "SBATCH_",', '"SLURM_",', ["tests/launch/test_environment.py"],
    ),
    "a default of the shell beats the config": (
        "launch/slurm/slurm.py", "for name, option in DEFAULTS.items() if getattr(config, option) is None)}",
        "for name, option in DEFAULTS.items())}", ["tests/launch/test_environment.py"],
    ),
    "variables of the submitting shell reach a job": (
        "launch/slurm/clean.sh", "unset ${!SBATCH_@} ${!SRUN_@} ${!PMIX_@}", "unset",
        ["tests/launch/test_environment.py"],
    ),
    "a marker that can't be looked at is a missing one": (
        "train/checkpoint/checkpoint.py", "    except (FileNotFoundError, NotADirectoryError):\n        return None",
        "    except OSError:\n        return None", ["tests/train/checkpoint/test_unreadable.py"],
    ),
    "a file that a rank can't read ends that rank alone": (
        "train/checkpoint/checkpoint.py", "if unread:  #", "if False:  #",
        ["tests/train/checkpoint/test_unreadable.py"],
    ),
    "a link to checkpoints that are away is not seen": (
        "train/checkpoint/resume.py", "if run.checkpoints.is_symlink() and not run.checkpoints.exists():", "if False:",
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "a copy beside a checkpoint is one": (
        "core/run_dir.py", r'r"step-(\d{8,})"', r'r"step-(\d{8,})(?:\.bak)?"',
        ["tests/train/checkpoint/test_uncommitted.py"],
    ),
    "a link to a checkpoint that is away is passed over": (
        "train/checkpoint/checkpoint.py", "if path.is_symlink() and not path.exists():", "if False:",
        ["tests/train/checkpoint/test_unreadable.py"],
    ),
    "a file of a checkpoint's name is one": (
        "train/checkpoint/checkpoint.py", "        if path.is_dir():\n            found",
        "        if True:\n            found",
        ["tests/train/checkpoint/test_unreadable.py"],
    ),
    "a second save of a step deletes the first": (
        "train/checkpoint/saver.py", "if first and prepared:", "if first:",
        ["tests/train/checkpoint/test_unreadable.py", "-k", "second_save"],
    ),
    "a watcher passes over what a full disk took": (
        "tools/watch.py", "            except NoRoomError:\n                raise\n", "",
        ["tests/tools/test_watch.py", "-k", "costs_time"],
    ),
    "a watcher that starts on a full disk ends": (
        "tools/watch.py", "self._retried(self._prepare)", "self._prepare()",
        ["tests/tools/test_watch.py", "-k", "waits_for_space"],
    ),
    "a watcher of a run that ended long ago does not wait for space": (
        "tools/watch.py", "if gone and on_first_rank(self._is_impatient):", "if gone:",
        ["tests/tools/test_watch.py", "-k", "waits_for_space"],
    ),
    "a watcher that gives up on a full disk has ended well": (
        "tools/watch.py", "raise NoRoomError(\n", "return str(\n",
        ["tests/tools/test_watch.py", "-k", "stays_full"],
    ),
    "a watcher's log on a full disk ends it": (
        "tools/watch.py", '    print_without_fail("stdout", "stderr")', "    pass",
        ["tests/tools/test_watch.py", "-k", "stays_full"],
    ),
    "slow ranks are added to metrics that are written": (
        "train/loop.py", "state.step):  # before it is collected\n",
        "state.step):  # before it is collected\n            self._collect()\n",
        ["tests/train/faults/test_faults.py", "-k", "waits_for_its_data"],
    ),
    "a file that gets its name is missed by who makes room": (
        "data/storage/cache.py", 'with self.lock("names"):  # a file', "if True:  # a file",
        ["tests/data/storage/test_storage.py", "-k", "gets_its_name"],
    ),
    "a cache on a full disk keeps its old files": (
        "data/storage/cache.py", "if not freed:", "if True:",
        ["tests/data/storage/test_storage.py", "-k", "full_disk"],
    ),
    "what a reader meets is a mistake for its group": (
        "data/loader/stream.py", '"kind": _kind(error)', '"kind": "DataError"',
        ["tests/data/loader/test_elastic.py", "-k", "groups"],
    ),
    "a second Ctrl-C waits as well": (
        "launch/local/local.py", "            self._kill.set()\n", "            pass\n",
        ["tests/launch/test_ends.py", "-k", "ctrl_c"],
    ),
    "SLURM_ variables reach a job that follows": (
        "launch/slurm/clean.sh", "unset ${!SLURM_@} ${!SLURMD_@} ${!MOVA_@}", "true",
        ["tests/launch/test_environment.py"],
    ),
}  # fmt: skip
