// Command maintained builds the homeserver on the line of Dendrite that Element maintains:
//
//	go run ./patches/maintained -o dendrite
//
// It downloads the release's sources, applies the patches to a copy, and builds the command. The result is under that line's licence, the
// AGPL: every user of the server on the network can ask for its sources. The flag -source keeps them.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
)

func main() {
	binary := flag.String("o", "dendrite", "where to put the homeserver")
	source := flag.String("source", "", "a folder that does not exist yet, to keep the sources in")
	flag.Parse()
	if err := commandline.NoArguments(flag.CommandLine, "where to put the homeserver is said with -o"); err != nil {
		fmt.Fprintln(os.Stderr, "maintained:", err)
		os.Exit(2)
	}
	if err := run(*binary, *source); err != nil {
		fmt.Fprintln(os.Stderr, "maintained:", err)
		os.Exit(1)
	}
}

func run(binary, source string) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	if source == "" {
		dir, err := os.MkdirTemp("", "dendrite-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		source = filepath.Join(dir, "dendrite")
	}
	if err = patches.Maintained.Copy(source); err != nil {
		return err
	}
	tree, err := patches.Open(source)
	if err != nil {
		return err
	}
	if _, err = tree.Apply(); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", binary, "./cmd/dendrite")
	build.Dir, build.Stdout, build.Stderr = source, os.Stdout, os.Stderr
	if err = build.Run(); err != nil {
		return err
	}
	fmt.Println(binary, "is", tree.Line(), "with expiring and delayed events")
	return nil
}
