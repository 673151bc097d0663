module github.com/matrix-org/dendrite/setup/mscs/msc4140/test/complement

go 1.26.0

require (
	github.com/matrix-org/gomatrixserverlib v0.0.0-20260506075950-c9c468727353
	github.com/sirupsen/logrus v1.9.4
	github.com/tidwall/gjson v1.19.0
	golang.org/x/sys v0.46.0
)

require (
	github.com/tidwall/match v1.1.1 // indirect
	github.com/tidwall/pretty v1.2.1 // indirect
	golang.org/x/crypto v0.38.0 // indirect
)
