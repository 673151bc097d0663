// Command compare compares the results of two runs of the same tests. It reads the output of `go test -json`, and prints a line for each
// test and subtest with different results, and a line with the totals. It fails if a test passes in the first run but not in the second.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: go run ./compare BEFORE.json AFTER.json")
		os.Exit(2)
	}
	worse, err := compareFiles(os.Stdout, os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if worse > 0 || err != nil {
		os.Exit(1)
	}
}

func compareFiles(w io.Writer, before, after string) (worse int, err error) {
	var runs [2]results
	for i, name := range []string{before, after} {
		f, err := os.Open(name)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		if runs[i], err = read(f); err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
	}
	return compare(w, runs[0], runs[1]), nil
}

// results are the results of tests and subtests, by name: pass, fail or skip, or run if the test did not end.
type results map[string]string

// read reads the output of `go test -json`, which may contain lines of the compiler.
func read(r io.Reader) (results, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	found := results{}
	for line := range strings.Lines(string(data)) {
		var event struct{ Action, Package, Test string }
		if json.Unmarshal([]byte(line), &event) != nil || event.Test == "" {
			continue
		}
		switch event.Action {
		case "run", "pass", "fail", "skip":
			found[event.Package+" "+event.Test] = event.Action
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no tests")
	}
	return found, nil
}

// compare writes the differences. It returns how many tests passed before and do not pass now.
func compare(w io.Writer, before, after results) (worse int) {
	all := maps.Clone(before)
	maps.Copy(all, after)
	same := 0
	for _, test := range slices.Sorted(maps.Keys(all)) {
		was, is := before[test], after[test]
		if was == is {
			same++
			continue
		}
		if was == "pass" {
			worse++
		}
		fmt.Fprintf(w, "%s: %s -> %s\n", test, cmp.Or(was, "absent"), cmp.Or(is, "absent"))
	}
	fmt.Fprintf(w, "%s -> %s; same result: %d, other: %d, passed before and not now: %d\n",
		before, after, same, len(all)-same, worse)
	return worse
}

// String returns the number of tests for each result, without and with subtests.
func (r results) String() string {
	top, all := map[string]int{}, map[string]int{}
	for test, result := range r {
		all[result]++
		if _, name, _ := strings.Cut(test, " "); !strings.Contains(name, "/") {
			top[result]++
		}
	}
	var parts []string
	for _, result := range slices.Sorted(maps.Keys(all)) {
		parts = append(parts, fmt.Sprintf("%s %d (%d)", result, top[result], all[result]))
	}
	return strings.Join(parts, ", ")
}
