package msc4140

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/clientapi"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/keeper"
)

// Every test that docs/guarantees.md names must exist. Otherwise a guarantee has no test.
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

// Every link to a file leads to a file, and every anchor to a heading. That holds in the repository, and among the documents of a release,
// which are fewer.
func TestLinks(t *testing.T) {
	t.Run("Repository", func(t *testing.T) { checkLinks(t, ".") })
	t.Run("Release", func(t *testing.T) {
		if _, err := exec.LookPath("make"); err != nil && os.Getenv("CI") == "" {
			t.Skip("needs make")
		}
		tree := t.TempDir()
		out, err := exec.CommandContext(t.Context(), "make", "docs", "tree="+tree).CombinedOutput()
		require.NoError(t, err, "%s", out)
		checkLinks(t, tree)
	})
}

// checkLinks follows the links of all documents in a folder, except links to other sites.
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

// hasAnchor reports whether a document has a heading with this anchor, which is formed as GitHub forms it.
func hasAnchor(t *testing.T, path, anchor string) bool {
	for _, found := range heading.FindAllStringSubmatch(prose(t, path), -1) {
		slug := notInSlugs.ReplaceAllString(strings.ToLower(found[1]), "")
		if strings.ReplaceAll(slug, " ", "-") == anchor {
			return true
		}
	}
	return false
}

// The table in docs/operations.md has every metric with its labels, and no other.
func TestDocumentedMetrics(t *testing.T) {
	timers := expiration.New(expiration.Config{}, struct{ expiration.Store }{}, nil, nil)
	collectors := append(timers.Collectors(), clientapi.New(clientapi.Config{}, nil, nil, clientapi.Timers{}).Collectors()...)
	collectors = append(collectors, keeper.New(nil, nil, nil, nil).Collectors()...)
	var metrics []string
	for _, collector := range collectors {
		descriptions := make(chan *prometheus.Desc, 1) // each of them has one
		collector.Describe(descriptions)
		m := regexp.MustCompile(`fqName: "(\w+)".*variableLabels: (\{.*\})\}$`).FindStringSubmatch((<-descriptions).String())
		require.NotNil(t, m)
		metrics = append(metrics, m[1]+strings.TrimSuffix(m[2], "{}"))
	}
	require.ElementsMatch(t, metrics, firstColumn(t, "Metrics"))

	// Every metric that the code creates is among these.
	made := 0
	require.NoError(t, filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if entry.IsDir() && (path == "cmd" || path == "test") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		made += len(regexp.MustCompile(`\b(prometheus|promauto)\.New(Counter|Gauge|Histogram|Summary|Untyped)`).FindAll(source, -1))
		return err
	}))
	require.Len(t, collectors, made)
}

// The table in docs/operations.md has every reason why an event is dropped, and no other.
func TestDocumentedDropReasons(t *testing.T) {
	source, err := parser.ParseFile(token.NewFileSet(), filepath.Join("expiration", "errors.go"), nil, 0)
	require.NoError(t, err)
	var reasons []string
	ast.Inspect(source, func(n ast.Node) bool {
		if constant, ok := n.(*ast.ValueSpec); ok {
			if of, ok := constant.Type.(*ast.Ident); ok && of.Name == "DropReason" {
				reason, err := strconv.Unquote(constant.Values[0].(*ast.BasicLit).Value)
				require.NoError(t, err)
				reasons = append(reasons, reason)
			}
		}
		return true
	})
	require.NotEmpty(t, reasons)
	require.ElementsMatch(t, reasons, firstColumn(t, "Drop reasons"))
}

// firstColumn returns the first column of the table in a section of docs/operations.md.
func firstColumn(t *testing.T, heading string) (cells []string) {
	doc, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(doc), "# "+heading+"\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n#")
	for _, row := range regexp.MustCompile("(?m)^\\| `(.*?)` \\|").FindAllStringSubmatch(section, -1) {
		cells = append(cells, row[1])
	}
	return cells
}
