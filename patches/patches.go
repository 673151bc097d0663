// Package patches adds the extension to a source tree of Dendrite, and removes it.
//
// A tree gets our packages below setup/mscs/msc4140, without their tests, and two patches. The first, wiring.patch, adds the calls to
// Dendrite's own command. The second changes the go.mod and go.sum of the tree's line. If the line has another import path than our
// sources, both the sources and the patches are rewritten. No other file is changed. A tree that differs from what is expected is refused.
package patches

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"go/format"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Line is a line of Dendrite's releases: its module, and the release that the patches are made for.
type Line struct {
	Module, Version string
	patch           string
}

var (
	// Apache is the line that this module depends on.
	Apache = Line{"github.com/matrix-org/dendrite", "v0.13.8", "matrix-org.patch"}
	// Maintained is the line that Element maintains.
	Maintained = Line{"github.com/element-hq/dendrite", "v0.15.2", "element-hq.patch"}
	// Lines are all lines that have patches.
	Lines = []Line{Apache, Maintained}
)

func (l Line) String() string { return l.Module + " " + l.Version }

// own is the path of our packages in a tree.
const own = "setup/mscs/msc4140"

//go:embed *.patch
var patchFiles embed.FS

// Change is one file of a tree that is added or changed.
type Change struct {
	Name string
	New  bool
}

func (c Change) String() string {
	if c.New {
		return "A " + c.Name
	}
	return "M " + c.Name
}

// Tree is a source tree of Dendrite.
type Tree struct {
	dir   string
	line  Line
	files map[string][]byte // the added files: content by name
	patch []byte            // the changes to existing files
}

// Open recognises a source tree. It works in any folder of our module, because it reads the module's sources.
func Open(dir string) (*Tree, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	t := &Tree{dir: dir}
	if t.line, err = recognise(dir); err != nil {
		return nil, err
	}
	if t.files, err = t.line.sources(); err != nil {
		return nil, err
	}
	for _, name := range []string{"wiring.patch", t.line.patch} {
		patch, err := patchFiles.ReadFile(name)
		if err != nil {
			return nil, err
		}
		t.patch = append(t.patch, t.line.rewrite(patch)...)
	}
	return t, nil
}

// Line returns the tree's line.
func (t *Tree) Line() Line { return t.line }

var (
	modulePath   = regexp.MustCompile(`(?m)^module (\S+)$`)
	versionParts = regexp.MustCompile(`(?m)^\s*Version(?:Major|Minor|Patch) += (\d+)$`)
)

// recognise determines a tree's line from its go.mod and from the version in its sources.
func recognise(dir string) (Line, error) {
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return Line{}, fmt.Errorf("not a source tree of Dendrite: %w", err)
	}
	module := modulePath.FindSubmatch(mod)
	if module == nil || !slices.ContainsFunc(Lines, func(l Line) bool { return l.Module == string(module[1]) }) {
		return Line{}, fmt.Errorf("%s is not a source tree of Dendrite: its go.mod names none of %v", dir, Lines)
	}
	source, err := os.ReadFile(filepath.Join(dir, "internal", "version.go"))
	if err != nil {
		return Line{}, fmt.Errorf("not a source tree of Dendrite: %w", err)
	}
	var version []string
	for _, part := range versionParts.FindAllSubmatch(source, -1) {
		version = append(version, string(part[1]))
	}
	found := Line{Module: string(module[1]), Version: "v" + strings.Join(version, ".")}
	for _, line := range Lines {
		if line.Module == found.Module && line.Version == found.Version {
			return line, nil
		}
	}
	return Line{}, fmt.Errorf("there are no patches for %v, only for %v", found, Lines)
}

// rewrite replaces the import path in our sources and patches by the line's.
func (l Line) rewrite(text []byte) []byte {
	return bytes.ReplaceAll(text, []byte(Apache.Module+"/"), []byte(l.Module+"/"))
}

// sources returns the files that a tree gets from our module: the package that Dendrite calls, the packages that it needs, and the
// licence.
func (l Line) sources() (map[string][]byte, error) {
	list := exec.Command("go", "list", "-deps", "-json=Dir,Module,GoFiles,IgnoredGoFiles", Apache.Module+"/"+own)
	out, err := output(list)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for packages := json.NewDecoder(bytes.NewReader(out)); packages.More(); {
		var p struct {
			Dir                     string
			Module                  *struct{ Path, Dir string }
			GoFiles, IgnoredGoFiles []string
		}
		if err := packages.Decode(&p); err != nil {
			return nil, err
		}
		if p.Module == nil || p.Module.Path != Apache.Module+"/"+own {
			continue
		}
		below, err := filepath.Rel(p.Module.Dir, p.Dir)
		if err != nil {
			return nil, err
		}
		for _, name := range append(p.GoFiles, p.IgnoredGoFiles...) {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			source, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				return nil, err
			}
			// Another import path may change the order of the imports.
			if source, err = format.Source(l.rewrite(source)); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			files[path.Join(own, filepath.ToSlash(below), name)] = source
		}
		if below == "." {
			if files[own+"/LICENSE"], err = os.ReadFile(filepath.Join(p.Dir, "LICENSE")); err != nil {
				return nil, err
			}
		}
	}
	return files, nil
}

// Apply adds the extension to the tree and returns the changes. There are none if the tree has it already.
func (t *Tree) Apply() ([]Change, error) {
	applied, err := t.applied()
	if applied || err != nil {
		return nil, err
	}
	if dirty, err := t.dirty(); err != nil || len(dirty) > 0 {
		return nil, errors.Join(err, fmt.Errorf("the tree has changes that are not committed:\n%s", dirty))
	}
	changes, err := t.changes()
	if err != nil {
		return nil, err
	}
	if err = t.git(t.patch, "apply"); err != nil {
		return nil, err
	}
	for name, content := range t.files {
		if err = os.MkdirAll(filepath.Dir(t.path(name)), 0o755); err != nil {
			return nil, err
		}
		if err = os.WriteFile(t.path(name), content, 0o644); err != nil {
			return nil, err
		}
	}
	return changes, nil
}

// Undo removes the extension from the tree and returns the changes. There are none if the tree does not have it.
func (t *Tree) Undo() ([]Change, error) {
	applied, err := t.applied()
	if !applied || err != nil {
		return nil, err
	}
	changes, err := t.changes()
	if err != nil {
		return nil, err
	}
	if err = t.git(t.patch, "apply", "-R"); err != nil {
		return nil, err
	}
	for name := range t.files {
		if err = os.Remove(t.path(name)); err != nil {
			return nil, err
		}
	}
	return changes, t.removeEmpty()
}

// removeEmpty removes the folders that are empty once our files are gone.
func (t *Tree) removeEmpty() error {
	var folders []string
	err := filepath.WalkDir(t.path(own), func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			folders = append(folders, name)
		}
		return err
	})
	for _, folder := range slices.Backward(folders) {
		if left, _ := os.ReadDir(folder); len(left) == 0 {
			err = errors.Join(err, os.Remove(folder))
		}
	}
	return err
}

// applied reports whether the tree has the whole extension, or nothing of it. Anything in between is an error.
func (t *Tree) applied() (bool, error) {
	var there, foreign []string
	for name, content := range t.files {
		found, err := os.ReadFile(t.path(name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return false, err
		case bytes.Equal(found, content):
			there = append(there, name)
		default:
			foreign = append(foreign, name)
		}
	}
	slices.Sort(foreign)
	if len(foreign) > 0 {
		return false, fmt.Errorf("these files are in the tree, and are not as this version has them:\n%s", strings.Join(foreign, "\n"))
	}
	switch len(there) {
	case 0:
		if err := t.git(t.patch, "apply", "--check"); err != nil {
			return false, fmt.Errorf("the tree is not as %v was released: %w", t.line, err)
		}
		return false, nil
	case len(t.files):
		if err := t.git(t.patch, "apply", "--check", "-R"); err != nil {
			return false, fmt.Errorf("our packages are in the tree, but what was patched has changed since: %w", err)
		}
		return true, nil
	}
	return false, fmt.Errorf("only %d of our %d files are in the tree", len(there), len(t.files))
}

// dirty returns git's list of uncommitted changes, if the tree is in git. Untracked files do not count, because the patches only change
// tracked ones.
func (t *Tree) dirty() (string, error) {
	if _, err := os.Stat(t.path(".git")); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	out, err := output(t.command(nil, "status", "--porcelain", "--untracked-files=no"))
	return string(out), err
}

// changes returns the files that applying or undoing adds or changes.
func (t *Tree) changes() (all []Change, err error) {
	numstat, err := output(t.command(t.patch, "apply", "--numstat"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(numstat)) {
		all = append(all, Change{Name: strings.Fields(line)[2]})
	}
	for name := range t.files {
		all = append(all, Change{Name: name, New: true})
	}
	slices.SortFunc(all, func(a, b Change) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func (t *Tree) path(name string) string { return filepath.Join(t.dir, filepath.FromSlash(name)) }

func (t *Tree) git(stdin []byte, args ...string) error {
	_, err := output(t.command(stdin, args...))
	return err
}

// command is a git command in the tree. It ignores a repository that merely contains the tree.
func (t *Tree) command(stdin []byte, args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Stdin = t.dir, bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(t.dir))
	return cmd
}

// output runs a command and returns its output. An error contains what the command wrote to standard error.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", cmd.Args[0], cmd.Args[1], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
