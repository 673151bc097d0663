// Command check tests a live homeserver for the features that Element Call needs. It prints what works, and advice for what is missing.
//
// It exits with 0 if calls work, with 1 if a feature is missing that calls need, and with 2 if the command line is wrong.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
)

const (
	// wholeTime limits all checks together, and tidyTime the clean-up after them.
	wholeTime = 3 * time.Minute
	tidyTime  = 30 * time.Second
)

const (
	exitMissing = 1
	exitUsage   = 2
)

func main() {
	var who credentials
	server := flag.String("server", "", "The homeserver: https:// and its server name, or the URL at which clients reach it")
	flag.StringVar(&who.user, "user", "", "An account on it")
	flag.StringVar(&who.password, "password", "", "Its password; or $PASSWORD")
	flag.StringVar(&who.token, "token", "", "Instead: an access token, of a login that no client uses; or $ACCESS_TOKEN")
	flag.StringVar(&who.secret, "registration-secret", "", "Instead: the registration_shared_secret, to make an account; or $REGISTRATION_SECRET")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), `check --server URL [--user NAME --password PASSWORD | --token TOKEN | --registration-secret SECRET]

Tries on a live homeserver what Element Call needs of it. Without an account it makes one, if anybody may register there.
It leaves no room, login, event or account of its own behind that can be used.

`)
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := commandline.NoArguments(flag.CommandLine, "the homeserver is named with --server"); err != nil {
		fmt.Fprintln(os.Stderr, "check:", err)
		os.Exit(exitUsage)
	}
	who.password = cmp.Or(who.password, os.Getenv("PASSWORD"))
	who.token = cmp.Or(who.token, os.Getenv("ACCESS_TOKEN"))
	who.secret = cmp.Or(who.secret, os.Getenv("REGISTRATION_SECRET"))
	if u, err := url.Parse(*server); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" ||
		(who.user != "") != (who.password != "") {
		flag.Usage()
		os.Exit(exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if !check(ctx, *server, who) {
		stop()
		os.Exit(exitMissing)
	}
}

// check runs all checks and prints the table. It reports whether calls work.
func check(ctx context.Context, server string, who credentials) (works bool) {
	ctx, cancel := context.WithTimeout(ctx, wholeTime)
	defer cancel()
	s := newSession(server, who)
	found := report{untried: map[unknownError][]string{}}
	fmt.Printf("%s\n\n", server)
	for _, f := range features {
		seen, err := "", s.has(f.needs)
		if err == nil {
			seen, err = f.try(ctx, s)
		}
		found.add(f, seen, err)
	}
	tidying, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTime)
	defer cancel()
	for _, left := range s.tidyUp(tidying) {
		fmt.Println("\nleft behind:", left)
	}
	found.summary()
	return found.works()
}
