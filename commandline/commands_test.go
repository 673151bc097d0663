package commandline

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Every command refuses an unexpected argument and does nothing else.
func TestCommands(t *testing.T) {
	binaries := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-w", "-o", binaries+string(filepath.Separator),
		"../cmd/...", "../patches/...", "../test/bench")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	built, err := os.ReadDir(binaries)
	require.NoError(t, err)
	var names []string
	for _, binary := range built {
		names = append(names, binary.Name())
	}
	require.Subset(t, names, []string{"dendrite", "demo", "check", "apply", "maintained", "bench"})
	for _, name := range names {
		cmd := exec.CommandContext(t.Context(), filepath.Join(binaries, name), "surplus", "--version")
		cmd.Dir = t.TempDir()
		out, err := cmd.CombinedOutput()
		require.Error(t, err, name)
		require.Positive(t, cmd.ProcessState.ExitCode(), "%s: %s", name, out)
		require.Contains(t, string(out), `"surplus"`, name)
		left, err := os.ReadDir(cmd.Dir)
		require.NoError(t, err)
		require.Empty(t, left, name)
	}
}
