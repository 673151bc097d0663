// Command all runs every check that go test ./... leaves out, because the check takes long, measures, or needs other programs:
//
//	go run ./test/all                       # everything, one group after the other
//	go run ./test/all -list                 # which groups there are
//	go run ./test/all -run crashes,soak     # some of them
//
// It prints its progress and a summary, and exits with 1 if a step failed. In CI, which means that the environment variable CI is set, a
// skipped test counts as failed.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	r := &runner{ci: os.Getenv("CI") != "", out: os.Stdout}
	list := flag.Bool("list", false, "list the groups, and run nothing")
	only := flag.String("run", "", "run these `groups` only, with commas between them")
	skip := flag.String("skip", "", "leave these `groups` out")
	flag.BoolVar(&r.elementHQ, "element-hq", false, "download Dendrite's AGPL line from Element, and run the group patches on it, too")
	flag.BoolVar(&r.whole, "whole", false, "in the group patches, run the whole of "+integration+" on each line, which takes long, instead of a part")
	flag.Parse()
	chosen, err := choose(*only, *skip)
	if err == nil && flag.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q: groups are chosen with -run", flag.Arg(0))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "all:", err)
		os.Exit(2)
	}
	if *list {
		for _, g := range chosen {
			fmt.Printf("%-12s %s\n", g.name, g.what)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	r.ctx = ctx
	failed := r.runAll(chosen)
	stop()
	if failed {
		os.Exit(1)
	}
}

// choose returns the groups named in only, or all groups, without those named in skip.
func choose(only, skip string) ([]group, error) {
	names := func(list string) ([]string, error) {
		if list == "" {
			return nil, nil
		}
		names := strings.Split(list, ",")
		for _, name := range names {
			if !slices.ContainsFunc(groups, func(g group) bool { return g.name == name }) {
				return nil, fmt.Errorf("there is no group %q; -list lists them", name)
			}
		}
		return names, nil
	}
	wanted, err := names(only)
	if err != nil {
		return nil, err
	}
	unwanted, err := names(skip)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(groups), func(g group) bool {
		return wanted != nil && !slices.Contains(wanted, g.name) || slices.Contains(unwanted, g.name)
	}), nil
}

// runAll runs groups and prints a summary. It reports whether any of them failed.
func (r *runner) runAll(chosen []group) (failed bool) {
	began := time.Now()
	var summary []string
	for i, g := range chosen {
		r.say("\n== %d/%d %s: %s (after %s)", i+1, len(chosen), g.name, g.what, rounded(time.Since(began)))
		groupBegan := time.Now()
		r.skipped = nil
		result := "ok"
		err := r.runGroup(g)
		if r.ctx.Err() != nil {
			err = r.ctx.Err()
		}
		switch {
		case err != nil:
			result, failed = "FAILED: "+err.Error(), true
		case len(r.skipped) > 0:
			result = "ok, but skipped: " + strings.Join(r.skipped, ", ")
		}
		summary = append(summary, fmt.Sprintf("%-12s %8s  %s", g.name, rounded(time.Since(groupBegan)), result))
		if r.ctx.Err() != nil {
			break
		}
	}
	r.say("\n== summary, after %s\n%s", rounded(time.Since(began)), strings.Join(summary, "\n"))
	return failed
}

// runGroup runs all steps of a group, even if one of them fails.
func (r *runner) runGroup(g group) error {
	if g.needs != nil {
		if err := g.needs(); err != nil {
			r.skipped = append(r.skipped, err.Error())
		}
	}
	var first error
	if len(r.skipped) == 0 {
		for _, s := range g.steps {
			err := error(nil)
			if s.do != nil {
				err = s.do(r)
			} else {
				err = r.run(s.args)
			}
			if first == nil {
				first = err
			}
		}
	}
	if first == nil && r.ci && len(r.skipped) > 0 {
		first = fmt.Errorf("skipped: %s", strings.Join(r.skipped, ", "))
	}
	return first
}

func rounded(d time.Duration) time.Duration { return d.Round(time.Second) }
