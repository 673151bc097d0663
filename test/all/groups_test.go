package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

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
			require.True(t, strings.Contains(commands(""), pkg+"\n") || pkg == "./patches" || // see runPatches
				strings.Contains(commands(""), "go -C "+pkg+" test "), "no group runs %s", pkg)
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
