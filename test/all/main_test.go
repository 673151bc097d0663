package main

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../.."

var (
	testFunc  = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	fuzzFunc  = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)
	longFiles = []byte("//go:build all\n")
)

// Every test that go test ./... leaves out is in exactly one group. Every fuzz target is in the group fuzz.
func TestNothingIsForgotten(t *testing.T) {
	require.NoError(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		below, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		pkg := "./" + filepath.ToSlash(below)
		for _, f := range fuzzFunc.FindAllSubmatch(source, -1) {
			require.Contains(t, commands("fuzz"), pkg+" -run=^$ -fuzz=^"+string(f[1])+"$", "the group fuzz lacks %s", f[1])
		}
		if !bytes.HasPrefix(source, longFiles) {
			return nil
		}
		if pkg != integration {
			require.True(t, strings.Contains(commands(""), pkg+"\n") || pkg == "./patches", "no group runs %s", pkg) // see runPatches
			return nil
		}
		for _, f := range testFunc.FindAllSubmatch(source, -1) {
			if name := string(f[1]); name != "TestMain" {
				require.Len(t, groupsOf(t, name), 1, "groups that run %s", name)
			}
		}
		return nil
	}))
}

// The groups that run the integration tests name only tests that exist.
func TestNothingIsMadeUp(t *testing.T) {
	var all []string
	files, err := filepath.Glob(root + "/test/integration/*_test.go")
	require.NoError(t, err)
	for _, file := range files {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, f := range testFunc.FindAllSubmatch(source, -1) {
			all = append(all, string(f[1]))
		}
	}
	patterns := append(runsOf(""), part, ownCommand)
	require.Greater(t, len(patterns), 5)
	for _, pattern := range patterns {
		for _, name := range strings.Split(strings.Trim(pattern, "^()$"), "|") {
			require.Contains(t, all, name)
		}
	}
}

// commands returns the commands of a group, or of all groups, one a line.
func commands(name string) string {
	var all strings.Builder
	for _, g := range groups {
		for _, s := range g.steps {
			if name == "" || g.name == name {
				all.WriteString(strings.Join(s.args, " ") + "\n")
			}
		}
	}
	return all.String()
}

// runsOf returns the patterns by which a group, or all groups, select integration tests.
func runsOf(name string) (patterns []string) {
	for _, g := range groups {
		for _, s := range g.steps {
			if (name == "" || g.name == name) && slices.Contains(s.args, integration) {
				for _, arg := range s.args {
					if pattern, ok := strings.CutPrefix(arg, "-run="); ok {
						patterns = append(patterns, pattern)
					}
				}
			}
		}
	}
	return patterns
}

// groupsOf returns the groups that run an integration test.
func groupsOf(t *testing.T, test string) (names []string) {
	t.Helper()
	for _, g := range groups {
		for _, pattern := range runsOf(g.name) {
			matches, err := regexp.MatchString(pattern, test)
			require.NoError(t, err)
			if matches {
				names = append(names, g.name)
			}
		}
	}
	return names
}

func TestChoose(t *testing.T) {
	names := func(only, skip string) (names []string) {
		chosen, err := choose(only, skip)
		require.NoError(t, err)
		for _, g := range chosen {
			names = append(names, g.name)
		}
		return names
	}
	require.Len(t, names("", ""), len(groups))
	require.Equal(t, []string{"soak", "crashes"}, names("crashes,soak", ""))
	require.Equal(t, []string{"crashes"}, names("crashes,soak", "soak"))
	require.NotContains(t, names("", "images"), "images")
	for _, wrong := range []string{"crash", "crashes,", ","} {
		_, err := choose(wrong, "")
		require.ErrorContains(t, err, "no group")
	}
}

// A failed step fails the whole run, and so does a skipped test in CI. Its output is shown, and the other steps run all the same.
func TestFailures(t *testing.T) {
	script := func(script string) step { return command("sh", "-c", script, "-json") }
	const passed, failed = `{"Action":"pass","Package":"p","Test":"TestGood","Elapsed":2}`, `{"Action":"output","Package":"p","Test":"TestBad","Output":"why\n"}
{"Action":"fail","Package":"p","Test":"TestBad","Elapsed":0.1}`
	const skipped = `{"Action":"skip","Package":"p","Test":"TestAway"}`
	for _, test := range []struct {
		name  string
		ci    bool
		steps []step
		fails bool
		says  []string
	}{
		{"passes", true, []step{script("echo '" + passed + "'")}, false, []string{"ok     TestGood (2.0 s)", "g                  0s  ok"}},
		{"fails", false, []step{script("printf '%s\n' '" + failed + "'; exit 1"), script("echo '" + passed + "'")}, true,
			[]string{"FAILED TestBad (0.1 s):\nwhy\n", "TestGood", "FAILED: exit status 1"}},
		{"skips", false, []step{script("echo '" + skipped + "'")}, false, []string{"skipped: TestAway"}},
		{"skips in CI", true, []step{script("echo '" + skipped + "'")}, true, []string{"FAILED: skipped: TestAway"}},
		{"does not build", false, []step{script("echo 'x.go:1: no'; exit 1")}, true, []string{"x.go:1: no"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			r := &runner{ctx: context.Background(), out: &out, ci: test.ci}
			require.Equal(t, test.fails, r.runAll([]group{{name: "g", steps: test.steps}}))
			for _, says := range test.says {
				require.Contains(t, out.String(), says)
			}
		})
	}
}
