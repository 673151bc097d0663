package msc4140

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Every test that docs/guarantees.md names must exist, or a guarantee has none.
func TestGuaranteesNameTheirTests(t *testing.T) {
	doc, err := os.ReadFile("docs/guarantees.md")
	require.NoError(t, err)
	var tests strings.Builder
	require.NoError(t, filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		data, err := os.ReadFile(path)
		tests.Write(data)
		return err
	}))
	named := regexp.MustCompile("`(Test[A-Za-z]+)(?:/([A-Za-z]+))?`").FindAllStringSubmatch(string(doc), -1)
	require.NotEmpty(t, named)
	for _, name := range named {
		require.True(t, strings.Contains(tests.String(), "func "+name[1]+"(t *testing.T)"), name[0])
		require.True(t, name[2] == "" || strings.Contains(tests.String(), `"`+name[2]+`"`), name[0])
	}
}

// The first section of the changelog is the one of this version.
func TestChangelogNamesTheVersion(t *testing.T) {
	changelog, err := os.ReadFile("CHANGELOG.md")
	require.NoError(t, err)
	first := regexp.MustCompile(`(?m)^## (\S+)`).FindSubmatch(changelog)
	require.NotNil(t, first)
	if strings.HasSuffix(Version, "-dev") {
		require.Equal(t, "Unreleased", string(first[1]))
	} else {
		require.Equal(t, Version, string(first[1]))
	}
}

var (
	codeBlock  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	link       = regexp.MustCompile(`\]\(([^)\s]+)\)|<img src="([^"]+)"`)
	heading    = regexp.MustCompile(`(?m)^#+ (.*)$`)
	notInSlugs = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
)

// Every link to a file leads to one, and every anchor to a heading: in the repository, and among the documents of a release, which
// are fewer.
func TestLinks(t *testing.T) {
	t.Run("Repository", func(t *testing.T) { checkLinks(t, ".") })
	t.Run("Release", func(t *testing.T) {
		if _, err := exec.LookPath("make"); err != nil {
			t.Skip("needs make")
		}
		tree := t.TempDir()
		out, err := exec.CommandContext(t.Context(), "make", "docs", "tree="+tree).CombinedOutput()
		require.NoError(t, err, "%s", out)
		checkLinks(t, tree)
	})
}

// checkLinks follows the links of all documents in a folder. Links to other sites are not followed.
func checkLinks(t *testing.T, root string) {
	documents := 0
	require.NoError(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch name := entry.Name(); {
		case err != nil:
			return err
		case entry.IsDir() && (name == ".git" || name == "node_modules" || name == "dist"):
			return fs.SkipDir
		case entry.IsDir() || filepath.Ext(name) != ".md":
			return nil
		}
		documents++
		for _, found := range link.FindAllStringSubmatch(prose(t, path), -1) {
			target := found[1] + found[2]
			if strings.Contains(target, ":") {
				continue // another site
			}
			file, anchor, _ := strings.Cut(target, "#")
			to := path
			if file != "" {
				to = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: dead link: %s", path, target)
			} else if anchor != "" && !hasAnchor(t, to, anchor) {
				t.Errorf("%s: no such heading: %s", path, target)
			}
		}
		return nil
	}))
	require.Greater(t, documents, 8)
}

// prose is a document without its code.
func prose(t *testing.T, path string) string {
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return codeBlock.ReplaceAllString(string(data), "")
}

// hasAnchor reports whether a document has a heading with this anchor, as GitHub makes them.
func hasAnchor(t *testing.T, path, anchor string) bool {
	for _, found := range heading.FindAllStringSubmatch(prose(t, path), -1) {
		slug := notInSlugs.ReplaceAllString(strings.ToLower(found[1]), "")
		if strings.ReplaceAll(slug, " ", "-") == anchor {
			return true
		}
	}
	return false
}
