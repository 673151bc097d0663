package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// ownGroups matches the packages of go test ./... whose tests are in groups of their own.
var ownGroups = regexp.MustCompile(`/(test/integration|patches)$`)

// runUnits runs the tests of go test ./..., except those in ownGroups, with the race detector.
func runUnits(r *runner) error {
	list, err := exec.CommandContext(r.ctx, "go", "list", "./...").Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	packages := slices.DeleteFunc(strings.Fields(string(list)), ownGroups.MatchString)
	return r.run(tests(append([]string{"-race"}, packages...)...).args)
}

// runRelease builds the release in two clones of this repository, and compares the results.
func runRelease(r *runner) error {
	dir, err := os.MkdirTemp("", "msc4140-release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var sums [2]string
	for i, folder := range []string{"one", "another/folder"} {
		clone := filepath.Join(dir, folder)
		if err = r.run([]string{"git", "clone", "-q", ".", clone}); err != nil {
			return err
		}
		if err = r.run([]string{"make", "-s", "-C", clone, "dist", "ARCHS=amd64"}); err != nil {
			return err
		}
		sum, err := os.ReadFile(filepath.Join(clone, "dist", "SHA256SUMS"))
		if err != nil {
			return err
		}
		sums[i] = strings.TrimSpace(string(sum))
	}
	r.say("   %s", sums[0])
	if sums[0] != sums[1] {
		return fmt.Errorf("not the same in another folder: %s", sums[1])
	}
	return nil
}
