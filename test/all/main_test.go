package main

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../.."

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
