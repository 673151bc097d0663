package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// What is missing is named at once, all of it, and only what is needed.
func TestMissing(t *testing.T) {
	none := func(string) (string, error) { return "", exec.ErrNotFound }
	err := missing(parts{}, none)
	require.ErrorContains(t, err, "go is missing")
	require.ErrorContains(t, err, "npm is missing")
	require.NotContains(t, missing(parts{pages: "pages"}, none).Error(), "npm")
	require.NoError(t, missing(parts{}, func(string) (string, error) { return "/bin/it", nil }))
}

// The folders of the tests have what this command takes from them.
func TestFolders(t *testing.T) {
	root := filepath.Join("..", "..")
	mod, err := os.ReadFile(filepath.Join(root, livekitModule, "go.mod"))
	require.NoError(t, err)
	require.Contains(t, string(mod), livekitServer)
	data, err := os.ReadFile(filepath.Join(root, npmFolder, "package-lock.json"))
	require.NoError(t, err)
	var lock struct {
		Packages map[string]struct{ Integrity string }
	}
	require.NoError(t, json.Unmarshal(data, &lock))
	require.NotEmpty(t, lock.Packages[filepath.ToSlash(filepath.Dir(pagesFolder))].Integrity)
}

func TestDuring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		failed := errors.New("failed")
		require.ErrorIs(t, newScreen(&out).during("building", func() error {
			time.Sleep(40 * time.Second)
			return failed
		}), failed)
		require.Equal(t, "  building\n  ... 15 s\n  ... 30 s\n", out.String())
	})
}
