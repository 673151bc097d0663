package msc4140

import (
	"io/fs"
	"os"
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
