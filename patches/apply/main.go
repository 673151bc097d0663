// Command apply adds the extension to a source tree of Dendrite, or removes it:
//
//	go run ./patches/apply [-undo] <tree>
//
// It prints what it changes. It changes nothing if the tree is not as expected.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
)

func main() {
	var undo bool
	const what = "take the component out of the tree again"
	flag.BoolVar(&undo, "undo", false, what)
	flag.BoolVar(&undo, "R", false, what)
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: go run ./patches/apply [-undo] <dendrite source tree>")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintf(flag.CommandLine.Output(), "apply: needs one source tree, and flags in front of it, not %q\n", flag.Args())
		flag.Usage()
		os.Exit(2)
	}
	if err := run(flag.Arg(0), undo); err != nil {
		fmt.Fprintln(os.Stderr, "apply:", err)
		os.Exit(1)
	}
}

func run(dir string, undo bool) error {
	tree, err := patches.Open(dir)
	if err != nil {
		return err
	}
	do, done, nothing := tree.Apply, "applied to", "already applied to"
	if undo {
		do, done, nothing = tree.Undo, "undone in", "not applied to"
	}
	changes, err := do()
	if err != nil {
		return err
	}
	for _, change := range changes {
		fmt.Println(change)
	}
	if len(changes) == 0 {
		done = nothing
	}
	fmt.Println(done, tree.Line())
	return nil
}
