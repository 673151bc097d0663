//go:build all

package hostile

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// shownFindings is how many findings of one kind are shown in full.
const shownFindings = 4

// findings are the faults that the test has found, by kind.
type findings struct {
	mu  sync.Mutex
	all map[string][]finding
	// notes count observations that are no fault of the engine.
	notes map[string]int
}

type finding struct {
	in     *input
	detail string
}

func newFindings() *findings { return &findings{all: map[string][]finding{}, notes: map[string]int{}} }

// add records a fault, with the input that caused it, if that is known.
func (f *findings) add(kind string, in *input, format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all[kind] = append(f.all[kind], finding{in, fmt.Sprintf(format, args...)})
}

func (f *findings) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notes[fmt.Sprintf(format, args...)]++
}

// report fails the test if there are findings, and shows some of each kind.
func (f *findings) report(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, note := range slices.Sorted(maps.Keys(f.notes)) {
		t.Logf("%6d × %.300s", f.notes[note], note)
	}
	for _, kind := range slices.Sorted(maps.Keys(f.all)) {
		found := f.all[kind]
		var shown strings.Builder
		for _, finding := range found[:min(len(found), shownFindings)] {
			fmt.Fprintf(&shown, "\n    %.700s", finding.detail)
			if finding.in != nil {
				fmt.Fprintf(&shown, "\n      input: %.1500s", finding.in)
				if *keepFlag && !strings.Contains(finding.in.Name, ".json: ") {
					keep(t, kind, finding.in)
				}
			}
		}
		t.Errorf("%s: %d times%s", kind, len(found), shown.String())
	}
}

const seedFolder = "testdata/seeds"

// keep writes an input to the folder of seeds, so that later runs replay it.
func keep(t *testing.T, kind string, in *input) {
	name := regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(kind+" "+in.Name), "-")
	if err := os.WriteFile(filepath.Join(seedFolder, name+".json"), []byte(in.String()+"\n"), 0o600); err != nil {
		t.Error(err)
	}
}

// kept returns the inputs in the folder of seeds, in the order of their file names.
func kept(t *testing.T) (inputs []*input) {
	t.Helper()
	names, err := filepath.Glob(seedFolder + "/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		in := &input{}
		if err == nil {
			err = json.Unmarshal(data, in)
		}
		if err != nil {
			t.Fatalf("%s: %s", name, err)
		}
		in.Name = filepath.Base(name) + ": " + in.Name
		inputs = append(inputs, in)
	}
	return inputs
}
