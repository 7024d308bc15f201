# A signal ends `wait` early; the exit code counts once the step has ended.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
