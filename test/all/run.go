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

// runner runs commands and shows how far they are.
type runner struct {
	ctx       context.Context
	out       io.Writer
	ci        bool
	elementHQ bool
	whole     bool
	// skipped are the tests of the group that were.
	skipped []string
}

func (r *runner) say(format string, args ...any) { _, _ = fmt.Fprintf(r.out, format+"\n", args...) }

// run runs a command. What a go test -json prints is shown test by test, and in full where something failed.
func (r *runner) run(args []string, env ...string) error {
	cmd := exec.CommandContext(r.ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute // for what it leaves running
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
	// slow is how many seconds a test takes at least that has a line of its own.
	slow = 1
	// silence is after which time it is said which tests are running.
	silence = time.Minute
)

// follow shows what go test -json prints, until it ends.
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
				r.say("%s", strings.TrimRight(string(line), "\n")) // of the compiler, for example
				continue
			}
			r.show(e, printed, running)
		}
	}
}

// show shows one event. It remembers what each test has printed, and which are running.
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
