-- Whether the user may run some commands; runs none of them.
-- ARGV  for each command: how many words it has, then the words
-- Reply a number a command: 1 it may, 0 it may not, -1 this server cannot tell (it does not know the command)
local answers, at = {}, 1
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  local known, allowed = pcall(redis.acl_check_cmd, unpack(ARGV, at + 1, at + words))
  answers[#answers + 1] = known and (allowed and 1 or 0) or -1
  at = at + words + 1
end
return answers
