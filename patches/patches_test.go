//go:build all

package patches_test

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

var elementHQ = flag.Bool("element-hq", false, "download Dendrite's AGPL line from Element, and test it, too")

// lines returns the lines to test.
func lines() []patches.Line {
	if *elementHQ {
		return patches.Lines
	}
	return []patches.Line{patches.Apache}
}

// copied returns a fresh copy of a line's release.
func copied(t *testing.T, line patches.Line) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "dendrite")
	require.NoError(t, line.Copy(dir))
	return dir
}

// excerpt returns a tree with only the files that are read or changed, because copying all of them takes longer.
func excerpt(t *testing.T, line patches.Line) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "dendrite")
	release, err := line.Download()
	require.NoError(t, err)
	for _, name := range []string{"README.md", "go.mod", "go.sum", "internal/version.go", "cmd/dendrite/main.go"} {
		data, err := os.ReadFile(filepath.Join(release, name))
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	return dir
}

func TestMain(m *testing.M) { postgres.Main(m) }

// contents returns a folder's files by name, and its folders.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		switch {
		case name == ".git":
			return filepath.SkipDir
		case entry.IsDir():
			all[name+"/"] = ""
		default:
			data, err := os.ReadFile(path)
			all[name] = string(data)
			return err
		}
		return nil
	}))
	return all
}

// apply and undo open a tree first, as the command does.
func apply(dir string) ([]patches.Change, error) { return change(dir, (*patches.Tree).Apply) }
func undo(dir string) ([]patches.Change, error)  { return change(dir, (*patches.Tree).Undo) }

func change(dir string, do func(*patches.Tree) ([]patches.Change, error)) ([]patches.Change, error) {
	tree, err := patches.Open(dir)
	if err != nil {
		return nil, err
	}
	return do(tree)
}

// Apply changes the files that it names, and no others. A second call changes nothing, and Undo leaves no trace.
func TestApplyAndUndo(t *testing.T) {
	for _, line := range lines() {
		t.Run(line.String(), func(t *testing.T) {
			dir := copied(t, line)
			released := contents(t, dir)
			changes, err := apply(dir)
			require.NoError(t, err)
			applied := contents(t, dir)
			named := map[string]bool{}
			for _, c := range changes {
				_, was := released[c.Name]
				require.Equal(t, !was, c.New, c)
				require.NotEqual(t, released[c.Name], applied[c.Name], c)
				named[c.Name] = true
			}
			for name, content := range applied {
				if !named[name] && !strings.HasSuffix(name, "/") {
					require.Equal(t, released[name], content, "%s was changed and is not named", name)
				}
				if strings.HasPrefix(name, "setup/mscs/msc4140/") && line != patches.Apache {
					require.NotContains(t, content, patches.Apache.Module+"/", name)
				}
			}
			require.Contains(t, applied, "setup/mscs/msc4140/msc4140.go")
			require.Contains(t, applied, "setup/mscs/msc4140/failpoint/on.go", "what only a build tag needs")
			for name := range released {
				require.Contains(t, applied, name)
			}

			changes, err = apply(dir)
			require.NoError(t, err)
			require.Empty(t, changes)
			require.Equal(t, applied, contents(t, dir))

			undone, err := undo(dir)
			require.NoError(t, err)
			require.Len(t, undone, len(named))
			require.Equal(t, released, contents(t, dir))
			undone, err = undo(dir)
			require.NoError(t, err)
			require.Empty(t, undone)
		})
	}
}

// A tree that is not as expected is refused and stays as it is.
func TestRefuses(t *testing.T) {
	replace := func(t *testing.T, dir, name, old, new string) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Contains(t, string(data), old)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(strings.Replace(string(data), old, new, 1)), 0o600))
	}
	then := func(t *testing.T, dir string) {
		_, err := apply(dir)
		require.NoError(t, err)
	}
	for name, test := range map[string]struct {
		spoil func(t *testing.T, dir string)
		says  string
		do    func(dir string) ([]patches.Change, error)
	}{
		"NoModule": {func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(filepath.Join(dir, "go.mod")))
		}, "not a source tree of Dendrite", apply},
		"OtherModule": {func(t *testing.T, dir string) {
			replace(t, dir, "go.mod", patches.Apache.Module, "example.org/dendrite")
		}, "not a source tree of Dendrite", apply},
		"OtherVersion": {func(t *testing.T, dir string) {
			replace(t, dir, "internal/version.go", "VersionMinor = 13", "VersionMinor = 14")
		}, "there are no patches for github.com/matrix-org/dendrite v0.14.8", apply},
		"VersionOfTheOtherLine": {func(t *testing.T, dir string) {
			replace(t, dir, "go.mod", patches.Apache.Module, patches.Maintained.Module)
		}, "there are no patches for github.com/element-hq/dendrite v0.13.8", apply},
		"ChangedWhereThePatchGoes": {func(t *testing.T, dir string) {
			replace(t, dir, "cmd/dendrite/main.go", "prometheus.MustRegister(upCounter)", "")
		}, "cmd/dendrite/main.go: patch does not apply", apply},
		"FileOfOursIsThere": {func(t *testing.T, dir string) {
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "setup/mscs/msc4140/config"), 0o700))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "setup/mscs/msc4140/config/config.go"), nil, 0o600))
		}, "setup/mscs/msc4140/config/config.go", apply},
		"ChangedAfterwards": {func(t *testing.T, dir string) {
			then(t, dir)
			replace(t, dir, "setup/mscs/msc4140/config/config.go", "package", "// Mine.\npackage")
		}, "setup/mscs/msc4140/config/config.go", undo},
		"WiringChangedAfterwards": {func(t *testing.T, dir string) {
			then(t, dir)
			replace(t, dir, "cmd/dendrite/main.go", "Failed to start expiring events", "Mine")
		}, "cmd/dendrite/main.go: patch does not apply", undo},
		"HalfApplied": {func(t *testing.T, dir string) {
			then(t, dir)
			require.NoError(t, os.Remove(filepath.Join(dir, "setup/mscs/msc4140/config/config.go")))
		}, "of our", apply},
		"NotCommitted": {func(t *testing.T, dir string) {
			git(t, dir, "init", "-q")
			git(t, dir, "add", "-A", "-f")
			git(t, dir, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "release")
			replace(t, dir, "README.md", "Dendrite", "Mine")
		}, "changes that are not committed:\n M README.md", apply},
	} {
		t.Run(name, func(t *testing.T) {
			dir := excerpt(t, patches.Apache)
			test.spoil(t, dir)
			before := contents(t, dir)
			_, err := test.do(dir)
			require.ErrorContains(t, err, test.says)
			require.Equal(t, before, contents(t, dir))
		})
	}
}

// Apply works on a clean tree in git, which a maintainer has, and on a tree that merely lies in another repository.
func TestInGit(t *testing.T) {
	dir := excerpt(t, patches.Apache)
	git(t, filepath.Dir(dir), "init", "-q")
	inside, err := apply(dir)
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(dir, "setup/mscs/msc4140/msc4140.go"))
	_, err = undo(dir)
	require.NoError(t, err)

	git(t, dir, "init", "-q")
	git(t, dir, "add", "-A", "-f")
	git(t, dir, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "release")
	changes, err := apply(dir)
	require.NoError(t, err)
	require.Equal(t, inside, changes)
	git(t, dir, "add", "-A", "-f")
	require.Len(t, strings.Split(strings.TrimSpace(git(t, dir, "status", "--porcelain")), "\n"), len(changes))
	again, err := apply(dir)
	require.NoError(t, err)
	require.Empty(t, again)
	_, err = undo(dir)
	require.NoError(t, err)
	git(t, dir, "add", "-A", "-f")
	require.Empty(t, git(t, dir, "status", "--porcelain"))
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), "git", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}
