package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// runner runs commands and prints their progress.
type runner struct {
	ctx       context.Context
	out       io.Writer
	ci        bool
	elementHQ bool
	whole     bool
	// skipped are the names of the group's skipped tests.
	skipped []string
}

func (r *runner) say(format string, args ...any) { _, _ = fmt.Fprintf(r.out, format+"\n", args...) }

// run runs a command. It prints the output of go test -json test by test, and that of a failed test in full.
func (r *runner) run(args []string, env ...string) error {
	cmd := exec.CommandContext(r.ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute // for child processes that the command leaves running
	cmd.Stdout, cmd.Stderr = r.out, r.out
	if !slices.Contains(args, "-json") {
		return cmd.Run()
	}
	output, input := io.Pipe()
	cmd.Stdout, cmd.Stderr = input, input
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Run()
		_ = input.Close()
	}()
	r.follow(output)
	return <-ended
}

// event is a line of go test -json.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

const (
	// slow is how many seconds a test must take to get a line of its own.
	slow = 1
	// silence is the interval at which the running tests are printed.
	silence = time.Minute
)

// follow reads the output of go test -json until it ends, and prints it.
func (r *runner) follow(output io.Reader) {
	lines := make(chan []byte)
	go func() {
		defer close(lines)
		for in := bufio.NewReader(output); ; {
			line, err := in.ReadBytes('\n')
			if len(line) > 0 {
				lines <- line
			}
			if err != nil {
				return
			}
		}
	}()
	printed, running := map[string]string{}, map[string]time.Time{}
	ticks := time.NewTicker(silence)
	defer ticks.Stop()
	for {
		select {
		case <-ticks.C:
			for _, test := range slices.Sorted(maps.Keys(running)) {
				r.say("   …      %s, since %s", test, rounded(time.Since(running[test])))
			}
		case line, more := <-lines:
			if !more {
				return
			}
			var e event
			if json.Unmarshal(line, &e) != nil {
				r.say("%s", strings.TrimRight(string(line), "\n")) // for example output of the compiler
				continue
			}
			r.show(e, printed, running)
		}
	}
}

// show prints one event. It keeps the output of each test, and the tests that are running.
func (r *runner) show(e event, printed map[string]string, running map[string]time.Time) {
	name := cmp.Or(e.Test, e.Package)
	top := e.Test != "" && !strings.Contains(e.Test, "/")
	switch e.Action {
	case "run":
		if top {
			running[name] = time.Now()
		}
	case "output":
		printed[e.Package+" "+e.Test] += e.Output
	case "build-output":
		r.say("%s", strings.TrimRight(e.Output, "\n"))
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, e.Test)
			r.say("   skip   %s:\n%s", name, printed[e.Package+" "+e.Test])
		}
	case "fail":
		r.say("   FAILED %s (%.1f s):\n%s", name, e.Elapsed, printed[e.Package+" "+e.Test])
	case "pass":
		if e.Test == "" || top && e.Elapsed >= slow {
			r.say("   ok     %s (%.1f s)", name, e.Elapsed)
		}
	}
	if e.Action == "pass" || e.Action == "fail" || e.Action == "skip" {
		delete(running, name)
		delete(printed, e.Package+" "+e.Test)
	}
}
